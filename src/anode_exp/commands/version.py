"""``--version``."""

import sys
from importlib.metadata import version as of


def version() -> str:
    """This program's, Python's, torch's and CUDA's, in a line."""
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    python = sys.version.split()[0]
    return (
        f"anode_exp {of('anode_exp')}, Python {python}, torch {torch.__version__} with {cuda} ({device}), "
        f"torchvision {of('torchvision')}"
    )
