"""Train an image model, GM-DiT or DiTDH, on prepared data, from the repository's root:

    python -m training.imagenet --preset digits --data data/digits_train     # for one CPU
    python -m training.imagenet --data data/imagenet_256 --accumulate 16     # GMFlow's, a large GPU
    python -m training.imagenet --data data/imagenet_256 --preset gmdit_s_k8 --batch-size 256
    python -m training.imagenet --data DATA -k 1 --constant-log-std 0 --transition-ratio None
    python -m training.imagenet --preset digits_modes --source outputs/digits_source
    python -m training.imagenet --data data/imagenet_256 --validate-every 10000 --wandb
    torchrun --nproc-per-node 8 -m training.imagenet --data data/imagenet_256           # DDP
    torchrun --nproc-per-node 8 -m training.imagenet --data data/imagenet_256 --shard   # FSDP
    torchrun --nproc-per-node 8 -m training.imagenet --preset ditdh_xl --data data/imagenet_rae \\
        --source outputs/source
    torchrun --nproc-per-node 8 -m training.imagenet --preset ditdh_xl --data imagenet/train \\
        --encode --vae rae-dinov2-b --encode-precision bf16       # images, without a cache

training.prepare writes the data; with --encode they are its images, and --vae encodes them in every
iteration. The fourth line is ordinary flow matching, the baseline; the lines
with --source train from a mixture source (MM-FM). For more nodes give torchrun --nnodes and
--rdzv-endpoint, and a shared OUT.

If it is started again with the same --out, on any number of processes, a run resumes from its last
checkpoint; on one process to the very losses of a run that was never stopped. OUT/model.safetensors
is the checkpoint to resume from, and loads in ComfyUI at any time; OUT/samples holds pictures of
samples. With --validate-every, TensorBoard's logs have the Fréchet distance of samples; with
--wandb, all that is logged goes there too. At the end OUT/weights.safetensors is the model to
share: weights alone, in bfloat16.
"""

from __future__ import annotations

import sys

from training.common.processes import command, owned
from training.common.settings import parse_preset
from training.loop.image_presets import PRESETS, ImageConfig
from training.loop.image_trainer import ImageTrainer
from training.loop.trainer import train


def parse(arguments: list[str]) -> ImageConfig:
    """Parse the command line over the preset that it names."""
    return parse_preset(PRESETS, ImageTrainer.module, __doc__, arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command, with `sys.argv` if no arguments are given."""
    with command():
        config = parse(sys.argv[1:] if arguments is None else arguments)
        with owned(config.out, config.device):
            train(ImageTrainer, config).export()


if __name__ == "__main__":
    main()
