"""Train an image model, GM-DiT or DiTDH, on data that training.prepare wrote, from the repository's root:

    python -m training.imagenet --preset digits --data data/digits_train          # small; one CPU is enough
    python -m training.imagenet --data data/imagenet_256 --accumulate 16          # GMFlow's ImageNet model, on one large GPU
    python -m training.imagenet --data data/imagenet_256 --preset gmdit_s_k8 --batch-size 256
    python -m training.imagenet --data DATA -k 1 --constant-log-std 0 --transition-ratio None   # flow matching: the baseline
    python -m training.imagenet --preset digits_modes --source outputs/digits_source      # from a mixture source (MM-FM)
    torchrun --nproc-per-node 8 -m training.imagenet --preset ditdh_xl --data data/imagenet_rae --source outputs/source
    torchrun --nproc-per-node 8 -m training.imagenet --data data/imagenet_256     # DDP; more nodes: --nnodes, --rdzv-endpoint
    torchrun --nproc-per-node 8 -m training.imagenet --data data/imagenet_256 --shard      # FSDP: weights shared out

Started again with the same --out, on any number of processes, a run goes on from its last checkpoint; on one process to the
very losses of a run that was never stopped. OUT/model.safetensors is the checkpoint to resume from, and loads in ComfyUI at
any time; OUT/samples holds pictures of samples. At the end OUT/weights.safetensors is the model to share: weights alone, in
bfloat16. Several machines need a shared OUT.
"""

from __future__ import annotations

import sys

from training.loop import trainer
from training.loop.config import parse_preset
from training.loop.image_presets import PRESETS, Config
from training.loop.image_trainer import MODULE, Trainer


def parse(arguments: list[str]) -> Config:
    """The preset, then whatever the command line changes of it."""
    return parse_preset(PRESETS, MODULE, __doc__, arguments)


def main(arguments: list[str] | None = None) -> None:
    config = parse(sys.argv[1:] if arguments is None else arguments)
    run = trainer.main(lambda: Trainer(config))
    run.export()


if __name__ == "__main__":
    main()
