"""Measure memory and time of fitting a source, and compute what ImageNet's source needs.

    python -m tests.benchmarks.source_fit      # one CPU thread, 2 minutes; on a GPU if there is one

Peak memory is that of the tensors (measure.extra_memory). At small sizes it is compared with the
arithmetic. The arithmetic is then evaluated for 8192 modes of 768 dimensions and 1.28 million
images with latents of 768 x 16 x 16. Results go to docs/results/source_fit.json and .csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gmflow_core.source import em
from gmflow_core.source.moments import fit_given_modes
from gmflow_core.source.source import GaussianMixtureSource, LogJoint
from tests.benchmarks.measure import REPOSITORY, extra_memory, machine, measure_rates, seconds

EM_SIZES = ((256, 192), (512, 384), (1024, 768), (2048, 768))  # modes, dimensions
START_SIZES = (
    (2**14, 192, 64),
    (2**15, 384, 64),
    (2**15, 768, 128),
)  # samples, dimensions, centres
LATENT_SIZES = ((64, (64, 16, 16)), (256, (64, 16, 16)), (128, (256, 16, 16)))  # modes, shape
FULL = {"modes": 8192, "dimensions": 768, "samples": 1_281_167, "shape": (768, 16, 16)}
CARD = 24 * 2**30
COLUMNS = ("part", "size", "measured_mb", "arithmetic_mb", "ratio", "seconds", "gflops_per_second")


def em_bytes(modes: int, dims: int) -> int:
    """Return the bytes of an EM iteration and of the mixture that it starts from."""
    rows = em.rows_of(modes, dims)
    return max(76 * modes * dims, 60 * modes * dims + 8 * rows * modes + 12 * rows * dims)


def start_bytes(samples: int, dims: int, centres: int) -> int:
    """Return the bytes of k-means++.

    It holds the samples, three tables with a column for each candidate, a few more columns, and a
    block of squares.
    """
    return 4 * samples * (dims + 3 * (2 + int(math.log(centres))) + 8) + 4 * em.BLOCK


def latents_bytes(modes: int, shape: tuple[int, ...], chunk: int) -> int:
    """Return the bytes of the running means, and of a chunk of samples with its temporaries."""
    return 4 * math.prod(shape) * (modes + 6 * chunk)


def row(
    part: str, size: str, measured: int, arithmetic: int, spent: float, flops: float | None = None
) -> dict:
    """Print and return one row of the results."""
    line = {
        "part": part,
        "size": size,
        "measured_mb": measured / 1e6,
        "arithmetic_mb": arithmetic / 1e6,
    }
    line |= {
        "ratio": measured / arithmetic,
        "seconds": spent,
        "gflops_per_second": flops and flops / spent / 1e9,
    }
    print(
        ", ".join(
            f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in line.items()
            if v is not None
        ),
        flush=True,
    )
    return line


def best(function: Callable, device: str, repeats: int = 3) -> float:
    """Return the seconds of the fastest of several calls."""
    return min(seconds(function, device) for _ in range(repeats))


def random_mixture(modes: int, dims: int, device: str) -> em.EM:
    """Return random modes to start EM from."""
    means = torch.randn(modes, dims, dtype=torch.float64, device=device)
    return em.EM(means, torch.ones_like(means), means.new_full((modes,), -math.log(modes)), [])


def measure_em(modes: int, dims: int, device: str) -> dict:
    """Measure an EM iteration over two blocks of samples."""
    rows = em.rows_of(modes, dims)
    x, start = torch.randn(2 * rows, dims), random_mixture(modes, dims, device)
    origin = torch.zeros(dims, device=device)

    def iteration(tokens: Tensor = x) -> None:
        blocks = em._blocks([tokens], rows, torch.device(device), torch.float32, origin)
        start.update(blocks, len(tokens), 1e-6, torch.float32)

    memory = extra_memory(iteration, device) + 16 * modes * dims  # the mixture existed before
    size = f"{modes} x {dims}, {len(x)} samples"
    flops = 8 * len(x) * modes * dims
    return row("EM", size, memory, em_bytes(modes, dims), best(iteration, device), flops)


def measure_start(samples: int, dims: int, centres: int, device: str) -> dict:
    """Measure the choice of centres by k-means++."""
    x = torch.randn(samples, dims, device=device)

    def choose() -> None:
        em.kmeans_plus_plus(x, centres)

    memory = extra_memory(choose, device) + x.nbytes
    arithmetic, trials = start_bytes(samples, dims, centres), 2 + int(math.log(centres))
    size = f"{centres} of {samples} x {dims}"
    flops = 2 * samples * dims * centres * trials
    return row("start", size, memory, arithmetic, best(choose, device, 1), flops)


def measure_latents(modes: int, shape: tuple[int, ...], device: str, chunk: int = 64) -> dict:
    """Measure the moments of latents of `shape` whose modes are known."""
    x, mode = (
        torch.randn(chunk, *shape, device=device),
        torch.randint(0, modes, (chunk,), device=device),
    )

    def fit() -> None:
        fit_given_modes([(x, mode)] * 4, modes, shape, device=device)

    memory = extra_memory(fit, device) + x.nbytes
    size = f"{modes} modes of {'x'.join(map(str, shape))}, {4 * chunk} samples"
    return row("latents", size, memory, latents_bytes(modes, shape, chunk), best(fit, device, 2))


def beside_scikit_learn(
    samples: int = 20_000, modes: int = 256, dims: int = 192, iterations: int = 5
) -> dict:
    """Measure the same iterations from the same start by scikit-learn, in float64 and float32."""
    import warnings

    from sklearn.mixture import GaussianMixture

    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(modes, dims, generator=generator)
    x = centres[torch.randint(0, modes, (samples,), generator=generator)] + torch.randn(
        samples, dims, generator=generator
    )
    log_weights = torch.full((modes,), -math.log(modes))
    start = GaussianMixtureSource(x[:modes], torch.ones(modes, 1), log_weights)
    found = {"size": f"{samples} samples, {modes} modes x {dims}, {iterations} iterations"}

    def ours(dtype: torch.dtype = torch.float32) -> list[float]:
        return em.fit_mixture(
            x, modes, start=start, max_iterations=iterations, tolerance=0, dtype=dtype
        ).log_likelihoods

    found["ours_mb"] = extra_memory(ours, "cpu") / 1e6
    likelihoods = {}

    def note(name: str, function: Callable[[], float]) -> None:
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            likelihoods[name] = function()
            times.append(time.perf_counter() - begun)
        found[f"{name}_seconds"] = min(times)

    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        note(f"ours_{name}", lambda dtype=dtype: ours(dtype)[-1])
        theirs = GaussianMixture(
            modes,
            covariance_type="diag",
            max_iter=iterations,
            tol=0,
            means_init=start.means.numpy().astype(name),
            precisions_init=torch.ones(modes, dims).numpy().astype(name),
            weights_init=start.weights.numpy().astype(name),
            init_params="random_from_data",
        )
        data = x.numpy().astype(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # so few iterations do not converge
            note(
                f"scikit_learn_{name}",
                lambda theirs=theirs, data=data: float(theirs.fit(data).lower_bound_),
            )
            tracemalloc.start()
            theirs.fit(data)
            found[f"scikit_learn_{name}_mb"] = tracemalloc.get_traced_memory()[1] / 1e6
            tracemalloc.stop()
    found["nats_from_scikit_learns_float64"] = {
        k: v - likelihoods["scikit_learn_float64"] for k, v in likelihoods.items()
    }
    return found


def errors(modes: int = 256, dims: int = 768, samples: int = 512) -> list[dict]:
    """Measure the largest float32 error of log w_m + log N at the likeliest modes, in nats."""
    lines = []
    for std in (1.0, 0.1, 0.01):
        means = torch.randn(
            modes, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        x = means[torch.arange(samples) % modes] + std * torch.randn_like(
            means[torch.arange(samples) % modes]
        )
        given = (means, torch.full_like(means, std**2), means.new_full((modes,), -math.log(modes)))
        exact = LogJoint(*given)(x)
        rough = LogJoint(*given, torch.float32)(x.float()).double()
        share = (exact.argmax(1) == rough.argmax(1)).double().mean().item()
        likeliest = exact.argmax(1, keepdim=True)
        error = (rough.gather(1, likeliest) - exact.gather(1, likeliest)).abs().max().item()
        lines.append({"std_within_over_between": std, "error_nats": error, "same_mode": share})
        print(lines[-1], flush=True)
    return lines


def full_size() -> dict:
    """Compute what ImageNet's source needs; nothing here is measured."""
    modes, dims, samples, shape = FULL.values()
    rows = max(em.START_ROWS[0] * modes, em.START_ROWS[1])
    flops = 8 * samples * modes * dims
    trials = 2 + int(math.log(modes))
    needs = {
        "em_gb": em_bytes(modes, dims) / 1e9,
        "start_gb": start_bytes(rows, dims, modes) / 1e9,
        "latents_gb": latents_bytes(modes, shape, 85) / 1e9,
        "dense_responsibilities_float64_gb": 8 * samples * modes / 1e9,
        "tokens_on_the_host_gb": 4 * samples * dims / 1e9,
        "card_gb": CARD / 1e9,
        "em_flops_per_iteration": flops,
        "start_rows": rows,
        "start_flops": 2 * rows * dims * modes * trials,
        "start_bytes_read": 4 * rows * dims * modes,
    }
    needs["fits"] = max(needs["em_gb"], needs["start_gb"], needs["latents_gb"]) < needs["card_gb"]
    return needs


def main(arguments: list[str] | None = None) -> None:
    """Measure, compute, and write the results."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.source_fit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (1)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--quick", action="store_true", help="the smallest sizes only")
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "docs" / "results", help="folder for the results"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device, last = options.device, 1 if options.quick else None
    rows = [measure_em(*size, device) for size in EM_SIZES[:last]]
    rows += [measure_start(*size, device) for size in START_SIZES[:last]]
    rows += [measure_latents(*size, device) for size in LATENT_SIZES[:last]]
    results = {
        "machine": machine(device),
        "rates": measure_rates(device, options.quick),
        "rows": rows,
    }
    results["scikit_learn"] = beside_scikit_learn(**({"samples": 2000} if options.quick else {}))
    results["errors"] = errors()
    results["full_size"] = full_size()
    print(json.dumps({key: results[key] for key in ("scikit_learn", "full_size")}, indent=1))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "source_fit.json").write_text(json.dumps(results, indent=1) + "\n")
    with open(options.out / "source_fit.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in line.items()} for line in rows
        )


if __name__ == "__main__":
    main()
