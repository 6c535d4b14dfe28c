"""Whatever stands in a checkpoint's training state, a run goes on exactly or says what is wrong."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from gmflow_core.files.checkpoint import open_checkpoint
from gmflow_core.files.errors import FileError
from tests.training.test_checkerboard import SMALL, train
from training.checkerboard import parse
from training.loop.checkerboard_trainer import CheckerboardTrainer
from training.loop.checks import check_facts, check_state
from training.loop.optimizer import new_adamw
from training.loop.training_state import pack_state, unpack_state

FACTS = {"step": 3, "skipped_steps": 1, "seconds": 1.5, "starts": [{"command": "a", "step": 0}]}
MORE = {"mode_losses": torch.rand(2, 3), "rng": torch.get_rng_state()}


def trained(eight_bit=False):
    """Return a small network and its optimizer after a step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 128)  # large enough for 8-bit state
    optimizer = new_adamw(model, lr=1e-3, weight_decay=0.0, eight_bit=eight_bit)
    model(torch.rand(4, 64)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def state_of(model, optimizer):
    counters = {"step": torch.tensor(3), "skipped": torch.tensor(1)}
    return {**counters, **MORE, **pack_state(model, optimizer)}


def check(state, model, optimizer, facts=FACTS):
    check_facts(facts, state, "model.safetensors")
    check_state(state, model, optimizer, MORE, "model.safetensors")


TENSORS = {
    "missing weight": {"model.weight": None},
    "missing moment": {"optimizer.weight/exp_avg": None},
    "unknown weight": {"model.more": lambda t: torch.zeros(2)},
    "unknown slot": {"optimizer.weight/more": lambda t: torch.zeros(2)},
    "unknown name": {"optimizer.a/b/c": lambda t: torch.zeros(2)},
    "shape that broadcasts": {"optimizer.weight/exp_avg": lambda t: t[:1]},
    "transposed": {"optimizer.weight/exp_avg_sq": lambda t: t.T},
    "weight of another shape": {"model.weight": lambda t: t[:, :1]},
    "half precision": {"optimizer.weight/exp_avg": lambda t: t.half()},
    "NaN": {"optimizer.weight/exp_avg": lambda t: t * float("nan")},
    "infinite weight": {"model.weight": lambda t: t / 0},
    "negative variance": {"optimizer.weight/exp_avg_sq": lambda t: -t},
    "negative optimizer step": {"optimizer.weight/step": lambda t: -t},
    "several steps": {"step": lambda t: torch.tensor([3])},
    "negative step": {"step": lambda t: torch.tensor(-1)},
    "step of floats": {"step": lambda t: torch.tensor(3.0)},
    "another step": {"step": lambda t: torch.tensor(7)},
    "more skipped than done": {"skipped": lambda t: torch.tensor(4)},
    "no counter": {"skipped": None},
    "short generator": {"rng": lambda t: t[:100]},
    "losses of other modes": {"mode_losses": lambda t: t[:, :1]},
    "negative losses": {"mode_losses": lambda t: -t},
}


@pytest.mark.parametrize("case", TENSORS)
def test_an_altered_tensor_is_named(case):
    model, optimizer = trained()
    state = state_of(model, optimizer)
    check(state, model, optimizer)
    ((name, change),) = TENSORS[case].items()
    before = state.pop(name, None)
    if change is not None:
        state[name] = change(before)
    with pytest.raises(FileError, match=r"model\.safetensors .*--restart") as caught:
        check(state, model, optimizer)
    assert name in str(caught.value)


def test_an_optimizer_has_its_state_after_the_first_step_only():
    model, optimizer = trained()
    state = {k: t for k, t in state_of(model, optimizer).items() if "optimizer." not in k}
    with pytest.raises(FileError, match="lacks 'optimizer"):
        check(state, model, optimizer)
    state["skipped"] = state["step"]  # no step had a finite gradient
    check(state, model, optimizer, FACTS | {"skipped_steps": 3})


@pytest.mark.parametrize("eight_bit", [False, True])
def test_random_changes_are_refused_or_harmless(eight_bit):
    """Change tensors at random: names, shapes, types; what is accepted loads as it was."""
    if eight_bit:
        pytest.importorskip("bitsandbytes")
    model, optimizer = trained(eight_bit)
    rng = random.Random(0)
    state, accepted = state_of(model, optimizer), 0
    for _ in range(200):
        altered, name = dict(state), rng.choice(sorted(state))
        tensor = altered.pop(name)
        match rng.randrange(5):
            case 0:
                altered[name.replace("e", "x")] = tensor
            case 1:
                altered[name] = tensor.flatten()[: rng.randrange(tensor.numel() + 1)]
            case 2:
                kinds = [torch.float64, torch.float32, torch.int64, torch.uint8, torch.bool]
                altered[name] = tensor.to(rng.choice(kinds))
            case 3:
                altered[name] = tensor.unsqueeze(0)
            case 4:
                pass
        try:
            check(altered, model, optimizer)
        except FileError:
            continue
        accepted += 1
        other, other_optimizer = trained(eight_bit)
        unpack_state(altered, other, other_optimizer)
        found = state_of(other, other_optimizer)
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert 0 < accepted < 60


RECORDS = [
    {"step": "3"},
    {"step": True},
    {"step": 9},
    {"skipped_steps": [1]},
    {"seconds": "long"},
    {"seconds": None},
    {"seconds": -1.0},
    {"seconds": float("nan")},
    {"starts": 5},
    {"starts": [{}]},
    {"starts": [{"command": 3, "step": 0}]},
    {"starts": {"command": "", "step": 0}},
]


@pytest.mark.parametrize("change", RECORDS, ids=str)
def test_an_altered_record_is_quoted(change):
    model, optimizer = trained()
    with pytest.raises(FileError, match=r"model\.safetensors .*--restart"):
        check(state_of(model, optimizer), model, optimizer, FACTS | change)


def test_a_run_goes_on_exactly_or_not_at_all(tmp_path):
    trainer = train(tmp_path, 10)
    expected = trainer.iterate()["loss"].item()
    with open_checkpoint(trainer.path) as file:
        tensors, metadata = load_file(trainer.path), file.metadata()

    def resumed(more_tensors=None, **more):
        save_file({**tensors, **(more_tensors or {})}, trainer.path, {**metadata, **more})
        return CheckerboardTrainer(parse([*SMALL, "--out", str(tmp_path), "--iterations", "20"]))

    assert resumed().iterate()["loss"].item() == expected
    name = next(n for n in tensors if n.endswith(".weight/exp_avg_sq"))
    nonsense = torch.full_like(tensors["training.rng"], 255)
    facts = json.loads(metadata["training"])
    for tensor in ({name: tensors[name][:1].clone()}, {"training.rng": nonsense}):
        with pytest.raises(FileError, match=r"model\.safetensors has|holds .*--restart"):
            resumed(tensor)
    for record in ({"seconds": []}, {"config": [1]}, {"config": facts["config"] | {"seed": False}}):
        with pytest.raises(ValueError, match=r"model\.safetensors .*--restart"):
            resumed(training=json.dumps({**facts, **record}))
    for other in ({"model_class": "GMDiT"}, {"config": "{}"}):
        with pytest.raises(ValueError, match=r"model of another shape.*--restart"):
            resumed(**other)
