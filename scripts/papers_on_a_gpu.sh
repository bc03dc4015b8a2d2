#!/usr/bin/env bash
# The papers' curves and tables at full length, the most important first. If interrupted, start it again to continue.
# Needs CIFAR-10 (and, for Fig. 5, CIFAR-100) under ANODE_DATA, or the network to download them. The seeds of a cell run
# at once. On an NVIDIA H200, at the speed that scripts/speed_on_a_gpu.py aims at, five seeds of 350 epochs take
#   ResNet-4, ResNet-10, SqueezeNext   about 15 to 25 minutes each
#   ResNet-18 (Figs. 4, 5)             about 40 minutes each
#   the adaptive RK45 cells            until they diverge, else hours, because they run without a graph; last
#
#   bash scripts/papers_on_a_gpu.sh [FOLDER]      runs go to FOLDER/anode, FOLDER/anodev2 and FOLDER/pnode (outputs)
set -euo pipefail
out=${1:-outputs}
failed=0
run() {  # a failure does not stop the rest; an interruption does
  local code=0
  "${PYTHON:-.venv/bin/python}" -m anode_exp "$@" || code=$?
  if [ $code -ge 128 ]; then exit $code; fi
  if [ $code -ne 0 ]; then failed=$code; fi
}
fixed=residual,anode,reverse_adjoint
run reproduce anode "directory=$out" figure=table_resnet4,table_resnet10,fig3_rk2,fig3_euler "method=$fixed" seeds=5
run reproduce anodev2 "directory=$out" figure=table_resnet4,table_resnet10 seeds=5
for model in squeezenext resnet10 resnet4; do
  place=$out/modern/$model
  if [ "$(grep -ls '"status": "completed"' "$place"/*/results.json | wc -l)" = 5 ]; then continue; fi
  if [ -e "$place/0_seed-0/config.yaml" ]; then
    run train "resume=$place"
  else
    run train recipe=modern solver=rk2 "model=$model" seeds=5 "hydra.run.dir=$place"
  fi
done
run reproduce anode "directory=$out" figure=table_alexnet,fig4,fig5 "method=$fixed" seeds=3
run reproduce anodev2 "directory=$out" figure=table_alexnet,squeezenext,resnet18 seeds=3
run reproduce anode "directory=$out" method=reverse_adjoint_rk45 seeds=1
run reproduce anode "directory=$out" figure=fig1_fig7
run reproduce pnode "directory=$out" seeds=3
for paper in anode anodev2 pnode; do
  run report "$paper" "directory=$out" "to=docs/results/$paper"
done
exit $failed
