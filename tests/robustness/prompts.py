"""Send hostile inputs through POST /prompt to a real ComfyUI server.

    python -m tests.robustness --prompts 2000

Each prompt is a good one in which one or two inputs of nodes of this extension are replaced: by
null, numbers, huge numbers, NaN and infinity, text with lone surrogates, NUL or a million
characters, paths, lists, objects, links to wrong outputs. After each group of 25 a good prompt has
to run. What may happen: ComfyUI refuses the prompt; the node's error says what is wrong; it runs;
or a stock node fails by itself, without any code of the extension at work ("stock error"). What may
not: Python's own error, a picture or latent that is not finite without a word, a prompt that
neither ends nor can be interrupted, a server that is gone.
"""

from __future__ import annotations

import copy
import json
import random
import re
import resource
import tempfile
import time
from argparse import Namespace
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.comfyui.client import Comfy, PromptError, Result
from tests.comfyui.graphs import node
from tests.comfyui.installation import COMFYUI, is_installed
from tests.comfyui.server import running

from .graphs import Prompt, every_prompt, reseeded, serve
from .odd_inputs import odd_source
from .place import finish, print_table, rng_of, write_results
from .values import TEXTS, hostile_value, write_hostile_files

GROUP = 25  # prompts between two good ones
SLOW, HANG = 20, 60  # seconds until a prompt is interrupted, and after that
MEMORY = 12 * 2**30  # bytes of address space that the server may take
KINDS = ("rejected", "clear error", "stock error", "success", "interrupted")
BAD = ("raw error", "not finite", "hang", "dead")
# In a traceback's lines of the extension's code; 8-bit layers are called as stock ones are
OURS = re.compile(r"/gmflow/(?!nodes/comfyui/int8_)")
LIBRARIES = re.compile(r"/site-packages/|/lib/python3|<frozen")
MOST_SHOWN = 40  # failures that are printed


@dataclass
class Found:
    """What a hostile prompt did."""

    kind: str
    node: str = ""  # class of the node that failed
    text: str = ""


def run(arguments: Namespace) -> int:
    """Send the prompts, print the table, and return the exit status."""
    if not is_installed():
        print(f"prompts: left out, as there is no ComfyUI in {COMFYUI}")
        return 0
    with tempfile.TemporaryDirectory(prefix="gmflow_prompts_") as folder, ExitStack() as stack:
        door = Door(Path(folder), stack, arguments.seed)
        for number in range(arguments.prompts):
            door.send(number)
            if number % GROUP == GROUP - 1:
                door.good(number)
        return door.report(arguments)


@dataclass
class Door:
    """A server that gets hostile prompts, and is started anew if one ends it."""

    folder: Path
    stack: ExitStack
    seed: int
    comfy: Comfy | None = None
    counts: dict[str, Counter] = field(default_factory=dict)
    failures: list[dict[str, Any]] = field(default_factory=list)
    starts: int = 0

    def __post_init__(self):
        self.prompts = {name: tapped(prompt) for name, prompt in every_prompt().items()}
        self.start()
        info = self.comfy.object_info()
        self.known, self.inputs = set(info), {}
        for name, about in info.items():
            if name.startswith("GMFlow"):
                given = about["input"].get("required", {}) | about["input"].get("optional", {})
                self.inputs[name] = {each: str(kind[0]) for each, kind in given.items()}
        used = {
            about["class_type"] for prompt in self.prompts.values() for about in prompt.values()
        }
        if missing := set(self.inputs) - used:
            raise RuntimeError(f"no prompt has {', '.join(sorted(missing))}")
        self.files = write_hostile_files(self.folder / "hostile")

    def start(self) -> None:
        """Start a server, and stop the old one."""
        self.stack.close()
        self.starts += 1
        base = self.folder / "base"
        base.mkdir(exist_ok=True)
        self.comfy = self.stack.enter_context(running(base, _limit_memory))
        serve(self.comfy)

    def prompt(self, number: int) -> tuple[Prompt, list[str]]:
        """Return hostile prompt `number`, and what was changed in it.

        Every fifth one has the next hostile text in the next text field.
        """
        rng = rng_of(self.seed, "prompt", number)
        texts = [(k, n) for k, given in self.inputs.items() for n in given if given[n] == "STRING"]
        fields = sorted(texts)
        kind = sorted(self.inputs)[number % len(self.inputs)]
        turn, is_text = divmod(number, 5)
        if is_text == 0:
            kind, name = fields[turn % len(fields)]
        names = [n for n, p in self.prompts.items() if kind in _kinds(p)]
        prompt = reseeded(self.prompts[rng.choice(names)], rng.randrange(1000))
        if is_text == 0:
            text = TEXTS[turn // len(fields) % len(TEXTS)]
            for about in prompt.values():
                if about["class_type"] == kind:
                    about["inputs"][name] = text
            return prompt, [f"{kind}.{name} = {ascii(text)[:120]}"]
        changes = []
        for _ in range(rng.choice((1, 1, 1, 2))):
            changes.append(self._change(prompt, kind, rng))
        return prompt, changes

    def _change(self, prompt: Prompt, kind: str, rng: random.Random) -> str:
        """Replace an input of a node of this class."""
        nodes = [n for n, about in prompt.items() if about["class_type"] == kind]
        inputs = prompt[rng.choice(nodes)]["inputs"]
        types = self.inputs[kind] or {"unknown": "STRING"}
        name = rng.choice(list(types))
        if rng.random() < 0.05:
            inputs.pop(name, None)
            return f"{kind}.{name} is left out"
        odd = odd_source(rng, types[name]) if rng.random() < 0.4 else None
        if odd and _kinds(odd) <= self.known:
            prompt |= copy.deepcopy(odd)
            inputs[name] = ["odd", 0]
            return f"{kind}.{name} from {json.dumps(odd)}"
        inputs[name] = hostile_value(rng, prompt, self.files, inputs.get(name), types[name])
        return f"{kind}.{name} = {ascii(inputs[name])[:120]}"

    def send(self, number: int) -> None:
        """Send a prompt, and count what it did."""
        prompt, changes = self.prompt(number)
        found = outcome(self.comfy, prompt)
        if found.kind in ("hang", "dead", "interrupted") and not self._answers():
            found.kind = "dead"
            self.start()
        kind = changes[0].split(".")[0]
        self.counts.setdefault(kind, Counter())[found.kind] += 1
        if found.kind in BAD:
            self.fail(number, found, changes)

    def good(self, number: int) -> None:
        """Run a good prompt; a server that cannot run it any more is started anew."""
        if not self._answers():
            self.fail(number, Found("dead", "", "a good prompt does not run"), ["a group of 25"])
            self.counts.setdefault("good prompts", Counter())["dead"] += 1
            self.start()

    def _answers(self) -> bool:
        """Return whether a good prompt runs."""
        good = reseeded(self.prompts["digits_quickstart"], int(time.monotonic() * 1000))
        try:
            return self.comfy.run(good, timeout=HANG, expect_error=True).status == "success"
        except (OSError, RuntimeError):
            return False

    def fail(self, number: int, found: Found, changes: list[str]) -> None:
        """Note a failure."""
        about = {"number": number, "kind": found.kind, "node": found.node, "changes": changes}
        self.failures.append({**about, "text": found.text[-700:]})

    def report(self, arguments: Namespace) -> int:
        """Print the table and the failures, and return the exit status."""
        rows = [
            {
                "node": name,
                "prompts": sum(counts.values()),
                **{kind: counts[kind] for kind in KINDS + BAD},
            }
            for name, counts in sorted(self.counts.items())
        ]
        total = {key: sum(row[key] for row in rows) for key in ("prompts", *KINDS, *BAD)}
        rows.append({"node": "all", **total})
        print_table(f"hostile prompts, seed {self.seed}", rows)
        write_results(arguments, "prompts", rows=rows, failures=self.failures)
        texts = [
            f"{f['kind']} in {f['node']}, prompt {f['number']}: {'; '.join(f['changes'])}\n"
            f"  {ascii(f['text'].strip()[-300:])}"  # noqa: RUF010
            for f in self.failures
        ]
        if len(texts) > MOST_SHOWN:
            texts = [*texts[:MOST_SHOWN], f"and {len(texts) - MOST_SHOWN} more"]
        return finish(texts)


def outcome(comfy: Comfy, prompt: Prompt) -> Found:
    """Send a prompt and wait for its end; return what it did."""
    try:
        number = comfy.submit(prompt)
    except PromptError as error:
        result = error.result
        ours = bool(OURS.search(result.traceback)) and not is_clear(result)
        text = f"{result.traceback}\n{json.dumps(result.errors)}"
        return Found("raw error" if ours else "rejected", "validation", text)
    except (OSError, ValueError, KeyError) as error:  # the server's answer is no JSON
        return Found("raw error", "POST /prompt", f"{type(error).__name__}: {error}")
    slow = False
    try:
        try:
            result = comfy.wait(number, SLOW, expect_error=True)
        except TimeoutError:
            slow = True
            comfy.interrupt()
            result = comfy.wait(number, HANG, expect_error=True)
    except TimeoutError:
        return Found("hang", text="it did not end, and could not be interrupted")
    except (OSError, RuntimeError) as error:
        return Found("dead", text=str(error))
    if slow and result.status == "interrupted":
        return Found("interrupted")
    return judge(comfy, prompt, result)


def judge(comfy: Comfy, prompt: Prompt, result: Result) -> Found:
    """Judge the result of a prompt that ended."""
    silent = not any("not finite" in text for text in result.texts.values())
    broken = [name for name in not_finite(comfy, result) if silent]
    if result.status == "error":
        failed = next(iter(set(result.errors) & set(prompt)), "")
        kind = prompt.get(failed, {}).get("class_type", "")
        if failed.startswith("odd") and not kind.startswith("GMFlow"):
            return Found("rejected", kind, "a stock node refuses to make the odd input")
        text = f"{result.traceback}\n{' '.join(result.errors.values())}"
        stock = not OURS.search(result.traceback)  # the extension has no part in it
        word = "clear error" if is_clear(result) else "stock error" if stock else "raw error"
        return Found(word, kind, text)
    if broken:
        return Found("not finite", ", ".join(broken), "nothing is said on a node")
    if result.errors:
        return Found("rejected", text=json.dumps(result.errors))
    return Found("success")


def tapped(prompt: Prompt) -> Prompt:
    """Return the prompt with a SaveLatent behind each sampler."""
    taps = {
        f"tap {name}": node("SaveLatent", samples=[name, 0], filename_prefix="taps/latent")
        for name, about in prompt.items()
        if about["class_type"] in ("GMFlowSampler", "KSampler", "SamplerCustomAdvanced")
    }
    return {**prompt, **taps}


def not_finite(comfy: Comfy, result: Result) -> list[str]:
    """Name the taps whose latents are not finite; delete the files of all."""
    found = []
    for name, output in result.outputs.items():
        for about in output.get("latents", ()):
            path = comfy.base / "output" / about["subfolder"] / about["filename"]
            if not load_file(path)["latent_tensor"].isfinite().all():
                found.append(name)
            path.unlink()
    return found


def is_clear(result: Result) -> bool:
    """Return whether a `raise` in the extension or in ComfyUI's own code raised the error."""
    lines = result.traceback.strip().splitlines()
    places = [n for n, line in enumerate(lines) if re.match(r'\s*File "', line)]
    if not places:
        return False
    last = places[-1]
    code = " ".join(lines[last + 1 :]).strip()
    return not LIBRARIES.search(lines[last]) and bool(re.match(r"raise\b", code))


def _kinds(prompt: Prompt) -> set[str]:
    return {about["class_type"] for about in prompt.values()}


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def again(seed: int, number: int) -> Prompt:
    """Return hostile prompt `number` of a run, to send it once more by hand."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        return copy.deepcopy(Door(Path(folder), stack, seed).prompt(number)[0])
