"""GM Class Labels in the page: the names of the connected model only."""

from __future__ import annotations

from .page import ComfyPage
from .stand_in_files import WORKFLOWS

WORKFLOW = next(  # one that has both nodes
    path
    for path in sorted(WORKFLOWS.glob("*.json"))
    if "GMFlowClassLabels" in (text := path.read_text()) and "digits_k8.safetensors" in text
)
LABELS = """() => {
  const node = window.app.graph.nodes.find((node) => node.type === 'GMFlowClassLabels');
  const { value, options } = node.widgets.find((widget) => widget.name === 'label');
  return [value, options.values];
}"""
CHOOSE = """(name) => {
  const node = window.app.graph.nodes.find((node) => node.type === 'GMFlowLoader');
  const widget = node.widgets.find((widget) => widget.name === 'model_name');
  widget.value = name;
  widget.callback?.(name);
}"""
DISCONNECT = """() => {
  window.app.graph.nodes.find((node) => node.type === 'GMFlowClassLabels').disconnectInput(0);
}"""


def labels_with(page: ComfyPage, model: str) -> tuple[str, list[str]]:
    """Choose a model in GM Load Model, and return the label and what may be chosen."""
    page.page.evaluate(CHOOSE, model)
    return tuple(page.page.evaluate(LABELS))


def test_only_the_connected_model_s_classes_are_listed(page: ComfyPage) -> None:
    digits, last = [str(digit) for digit in range(10)], "(only more_labels)"
    every = page.page.evaluate(
        "async () => (await window.app.api.getNodeDefs()).GMFlowClassLabels.input.required"
        ".label[1].options"
    )
    page.drop_workflow(WORKFLOW)
    assert page.page.evaluate(LABELS) == ["0", [*digits, last]]
    label, names = labels_with(page, "digits_modes_k8.safetensors")
    assert (label, names[0], names[-1]) == ("mode 0", "mode 0", last)
    assert not set(digits) & set(names)
    assert labels_with(page, "checkerboard_k64.safetensors")[1] == every  # it has none
    assert labels_with(page, "digits_k8.safetensors") == ("0", [*digits, last])
    page.page.evaluate(DISCONNECT)
    page.page.wait_for_function(f"() => ({LABELS})()[1].length === {len(every)}")
