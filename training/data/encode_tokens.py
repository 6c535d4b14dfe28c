"""Encode the images of a prepared folder to tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from gmflow_core.files.errors import FileError
from training.common.processes import together
from training.data.image_folder import ImageCrops, ImageList, image_loader, list_images
from training.data.pictures import DECODER
from training.data.shards import LatentDataset, to_model
from training.data.tokens import (
    FORMAT,
    TokenFiles,
    check_record,
    digest_of,
    encoder_settings,
    read_tokens_record,
    write_tokens,
)
from training.encoders.encoder import Encoder, load_encoder

PART = 4096  # images in a part; a stop loses the work on one part at most


def images_of(dataset: LatentDataset, root: Path | None) -> tuple[ImageList, list[int]]:
    """Find the images that a prepared folder was made from.

    Args:
        root: their folder; if None, the one they were in when the folder was prepared.

    Returns:
        All images, and the indices of those that are the folder's samples, in order.

    Raises:
        FileNotFoundError: the images are not there.
        ValueError: they are not the same images.
    """
    root = (
        Path(dataset.index.get("source", "a folder that its index does not name"))
        if root is None
        else root
    )
    if not root.is_dir():
        raise FileNotFoundError(
            f"{dataset.folder} was made from images in {root}, which is no folder here; give it as "
            "--images"
        )
    images = list_images(root)
    skipped = {entry["file"] for entry in dataset.index.get("skipped", [])}
    kept = [number for number, file in enumerate(images.files) if file not in skipped]
    if [images.labels[number] for number in kept] != dataset.labels.tolist():
        raise ValueError(
            f"the {len(kept)} images in {root} are not the {len(dataset)} that {dataset.folder} "
            "was made from; give their folder as --images"
        )
    return images, kept


def encode_images(
    images: ImageList,
    kept: Sequence[int],
    path: Path,
    state: PartialState,
    *,
    encoder: str,
    input_size: int | None = None,
    size: int = 256,
    batch_size: int = 64,
    workers: int | None = None,
) -> TokenFiles:
    """Write one token of each image to `path`, unless the tokens are there.

    Every process encodes its share. Finished parts are kept beside `path`, so that a run that was
    stopped goes on.

    Args:
        kept: indices of the images to encode, in order.
        encoder: one of `ENCODERS`, or the folder or hub id of one.
        input_size: side of the pictures that the encoder is given; if None, that of its kind.
        size: side of the centre crops.
        batch_size: images that are encoded at a time.
        workers: processes that decode images; see `loader_workers`.

    Raises:
        FileNotFoundError: the encoder or an image is missing.
        ValueError: the encoder cannot be used, an image cannot be read, or `path` holds other
            tokens.
        ModuleNotFoundError: transformers is not installed.
    """
    names = "\n".join(images.files[number] for number in kept)
    record = {
        "format": FORMAT,
        **encoder_settings(encoder, input_size, size),
        "count": len(kept),
        "files": hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest(),
    }
    check_record(path, record)
    state.wait_for_everyone()
    if path.exists():
        return TokenFiles([path])
    parts = [range(start, min(start + PART, len(kept))) for start in range(0, len(kept), PART)]
    folder = path.parent / f"{path.stem}.parts"
    files = [folder / f"{number:05d}.safetensors" for number in range(len(parts))]
    part_record = {**record, "decoder": DECODER}  # pictures that are decoded alike
    missing = [n for n, file in enumerate(files) if read_tokens_record(file) != part_record]
    state.wait_for_everyone()
    mine = [
        (parts[number], files[number])
        for number in missing[state.process_index :: state.num_processes]
    ]
    network = None
    for first in (True, False):  # the first process of a machine downloads for the others
        with together(state):
            if mine and state.is_local_main_process == first:
                network = load_encoder(record["encoder"], input_size).to(state.device)
    with together(state):
        if mine:
            _encode_parts(network, images, kept, mine, part_record, state, batch_size, workers)
    with together(state):
        if state.is_main_process:
            tokens = torch.cat(list(TokenFiles(files)))
            write_tokens(path, tokens, record | {"digest": digest_of([tokens])})
            for file in folder.glob("*.safetensors"):  # a longer run's too
                if file.stem.isdigit():
                    file.unlink()
            with suppress(OSError):  # other files are in it
                folder.rmdir()
    return TokenFiles([path])


def _encode_parts(
    network: Encoder,
    images: ImageList,
    kept: Sequence[int],
    parts: list[tuple[range, Path]],
    record: dict[str, Any],
    state: PartialState,
    batch_size: int,
    workers: int | None,
) -> None:
    """Encode these parts of `kept`, each into its file."""
    crops = ImageCrops(images, record["size"], flip=False, seed=0, noise_shape=None)
    batches = [
        [kept[n] for n in range(low, min(low + batch_size, part.stop))]
        for part, _ in parts
        for low in range(part.start, part.stop, batch_size)
    ]
    loader = iter(image_loader(crops, batches, workers, state))
    bar = tqdm(
        total=sum(map(len, batches)),
        unit="img",
        desc="tokens",
        disable=not state.is_main_process,
        dynamic_ncols=True,
    )
    with bar:
        for part, file in parts:
            tokens = []
            for _ in range(part.start, part.stop, batch_size):
                batch = next(loader)
                if batch.failed:
                    failed = batch.failed[0]
                    path = images.root / images.files[failed.index]
                    raise FileError(path, f"cannot be read ({failed.reason})", "mend it")
                tokens.append(network.token(network(to_model(batch.pixels.to(state.device)))).cpu())
                bar.update(len(tokens[-1]))
            write_tokens(file, torch.cat(tokens), record)
