import pytest
import torch
import torch.nn.functional as F

from anode_exp.data import Augmentation, EpochBatches, Normalisation, Split, balanced_subset, evaluation_batches

CPU = torch.device("cpu")
PLAIN = Normalisation([0.0] * 3, [1.0] * 3, CPU)


def split(n: int = 50) -> Split:
    generator = torch.Generator().manual_seed(0)
    return Split(torch.randint(1, 256, (n, 32, 32, 3), dtype=torch.uint8, generator=generator), torch.arange(n))


def epoch(seed=0, number=1, n=50, batch_size=16, crop=4, flip=True, normalise=PLAIN):
    return EpochBatches(split(n), batch_size, Augmentation(crop, flip), normalise, seed, number)


def stacked(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_every_image_once_and_the_last_batch_smaller():
    batches = list(epoch())
    assert [len(labels) for _, labels in batches] == [16, 16, 16, 2]
    assert len(batches) == len(epoch())
    assert sorted(stacked(batches)[1].tolist()) == list(range(50))


def test_an_epoch_depends_on_seed_and_number_alone():
    images, labels = stacked(epoch(seed=3, number=7))
    torch.manual_seed(99)  # the global generator has no effect
    again, labels_again = stacked(epoch(seed=3, number=7))
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    for seed, number in ((4, 7), (3, 8), (7, 3)):
        assert not torch.equal(labels, stacked(epoch(seed=seed, number=number))[1])


def test_seeds_and_epochs_do_not_run_into_each_other():
    orders = {tuple(epoch(seed=s, number=e).order.tolist()) for s in range(30) for e in range(1, 11)}
    assert len(orders) == 300


def test_an_epoch_can_be_entered_at_any_batch():
    whole = list(epoch())
    for step in range(5):
        rest = list(epoch().starting_at(step))
        assert len(rest) == max(4 - step, 0)
        assert all(
            torch.equal(a, b) for x, y in zip(rest, whole[step:], strict=True) for a, b in zip(x, y, strict=True)
        )


def test_the_batch_size_changes_nothing_but_the_grouping():
    assert torch.equal(stacked(epoch(batch_size=16))[0], stacked(epoch(batch_size=50))[0])


def test_crop_and_flip_against_padding_and_slicing():
    batches = epoch(crop=4)
    images, labels = stacked(batches)
    flipped = 0
    for i, label in enumerate(labels.tolist()):
        original = split().images[label].permute(2, 0, 1)
        padded = F.pad(original, (4, 4, 4, 4))
        dy, dx = (batches.offsets[:, i, 0] + 4).tolist()
        expected = padded[:, dy : dy + 32, dx : dx + 32]
        if batches.flips[i]:
            expected, flipped = expected.flip(-1), flipped + 1
        torch.testing.assert_close(images[i], expected.float() / 255)
    assert 10 < flipped < 40
    assert {-4, 4} <= set(batches.offsets.flatten().tolist()), "the whole range of crops is used"


def test_without_augmentation_images_are_themselves():
    images, labels = stacked(epoch(crop=0, flip=False))
    torch.testing.assert_close(images, split().images[labels].permute(0, 3, 1, 2) / 255.0)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_normalisation(memory_format):
    mean, std = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]
    images, _ = next(evaluation_batches(split(), 8, Normalisation(mean, std, CPU, memory_format)))
    raw = split().images[:8].permute(0, 3, 1, 2).double() / 255
    expected = (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(images, expected.float(), rtol=1e-5, atol=1e-5)
    assert images.is_contiguous(memory_format=memory_format)


def test_evaluation_is_in_order_and_whole():
    labels = torch.cat([labels for _, labels in evaluation_batches(split(), 16, PLAIN)])
    assert labels.tolist() == list(range(50))


@pytest.mark.parametrize("size", [0, 1, 10, 25, 100])
def test_a_subset_is_balanced_fixed_and_disjoint_from_the_rest(size):
    labels = torch.arange(100) % 10
    chosen, rest = balanced_subset(labels, size)
    assert len(chosen) == size and sorted([*chosen.tolist(), *rest.tolist()]) == list(range(100))
    counts = torch.bincount(labels[chosen], minlength=10)
    assert counts.max() - counts.min() <= 1
    torch.manual_seed(5)
    assert torch.equal(balanced_subset(labels, size)[0], chosen)


def test_a_subset_of_uneven_classes():
    labels = torch.tensor([0] * 90 + [1] * 5 + [2] * 5)
    chosen, _ = balanced_subset(labels, 20)
    assert torch.bincount(labels[chosen]).tolist() == [10, 5, 5]


def test_more_than_there_is():
    with pytest.raises(ValueError, match="size is 11, but there are only 10 images"):
        balanced_subset(torch.arange(10), 11)
