// GM Adapter Info: show its text on the node.

import { app } from "../../../scripts/app.js";
import { ComfyWidgets } from "../../../scripts/widgets.js";

const INFO = "GMFlowAdapterInfo";
const SHOWN = "shown_info"; // name of the widget, which is neither saved nor sent

function show(node, output) {
  const text = [output?.text ?? []].flat().join("\n");
  if (!text) return;
  let widget = node.widgets?.find((each) => each.name === SHOWN);
  if (!widget) {
    widget = ComfyWidgets.STRING(node, SHOWN, ["STRING", { multiline: true }], app).widget;
    widget.label = "info";
    widget.serialize = false;
    Object.assign(widget.options, { serialize: false, read_only: true });
    const element = widget.element ?? widget.inputEl;
    if (element) element.readOnly = true;
    const [width, height] = node.size;
    node.setSize([Math.max(width, 420), Math.max(height, 360)]);
  }
  widget.value = text;
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "gmflow.AdapterInfo",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== INFO) return;
    const executed = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      executed?.apply(this, arguments);
      show(this, output);
    };
  },
  onNodeOutputsUpdated(outputs) {
    // another workflow was shown, and this one again
    for (const [id, output] of Object.entries(outputs)) {
      const node = app.graph?.getNodeById(id) ?? app.graph?.getNodeById(Number(id));
      if (node?.type === INFO) show(node, output);
    }
  },
});
