// GM Class Labels: list the class names of the connected model only.
//
// The server's list holds the names of all models, and beside it, in `classes`, which model has
// which. Without this file, or behind a model of unknown origin, the whole list is shown.

import { app } from "../../../scripts/app.js";

const LABELS = "GMFlowClassLabels";
const LOADER = "GMFlowLoader";
const MOST_NODES = 100; // between the two
let about; // the list, and `classes`; undefined where the server tells none

function widgetOf(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

/** Return the GM Load Model that a node's MODEL comes from, undefined if that is not known. */
function loaderOf(node) {
  for (let count = 0; node && count < MOST_NODES; count++) {
    const inputs = node.inputs ?? [];
    const slot = inputs.findIndex((input) => input.type === "MODEL" && input.link != null);
    const only = inputs.length === 1 && inputs[0].link != null ? 0 : -1; // a reroute's
    const next = slot < 0 ? only : slot;
    node = next < 0 ? undefined : node.getInputNode(next);
    if (node?.type === LOADER) return node;
  }
}

/** Return the class names of the model that a loader loads, undefined if they are not known. */
function namesOf(loader) {
  const inputs = ["model_name", "hub_id_or_path"];
  if (loader.inputs?.some((input) => inputs.includes(input.name) && input.link != null)) return;
  const other = String(widgetOf(loader, "hub_id_or_path")?.value ?? "").trim();
  const model = other || widgetOf(loader, "model_name")?.value;
  const number = about.classes.models[model];
  return number === undefined ? undefined : about.classes.lists[number];
}

/** Set the choices of a GM Class Labels node; also its choice, if it was another model's. */
function update(node, mayChoose) {
  const widget = widgetOf(node, "label");
  if (!widget?.options || !about) return;
  const loader = loaderOf(node);
  const names = (loader && namesOf(loader)) ?? [];
  const last = about.options.at(-1); // no label, only more_labels
  widget.options.values = names.length ? [...names, last] : about.options;
  const { values } = widget.options;
  const isOthers = about.options.includes(widget.value) && !values.includes(widget.value);
  if (mayChoose && names.length && isOthers) {
    widget.value = names[0];
    widget.callback?.(widget.value);
  }
  node.setDirtyCanvas?.(true, true);
}

function updateAll(mayChoose) {
  const root = app.graph?.rootGraph ?? app.graph;
  for (const graph of [root, ...(root?.subgraphs?.values() ?? [])]) {
    for (const node of graph?.nodes ?? graph?._nodes ?? []) {
      if (node.type === LABELS) update(node, mayChoose);
    }
  }
}

function remember(definition) {
  const found = definition?.input?.required?.label;
  const options = found?.[1]?.options ?? found?.[0];
  if (!found?.[1]?.classes || !Array.isArray(options)) return;
  about = { options, classes: found[1].classes };
}

app.registerExtension({
  name: "gmflow.ClassLabels",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name === LABELS) remember(nodeData);
    const changed = nodeType.prototype.onConnectionsChange;
    nodeType.prototype.onConnectionsChange = function (...args) {
      const result = changed?.apply(this, args);
      if (!app.configuringGraph) setTimeout(() => updateAll(true)); // when the link is there
      return result;
    };
  },
  nodeCreated(node) {
    if (node.comfyClass !== LOADER) return;
    for (const widget of node.widgets ?? []) {
      const callback = widget.callback;
      widget.callback = function (...args) {
        const result = callback?.apply(this, args);
        if (!app.configuringGraph) updateAll(true);
        return result;
      };
    }
  },
  afterConfigureGraph() {
    updateAll(false);
  },
  refreshComboInNodes(definitions) {
    remember(definitions?.[LABELS]);
    updateAll(false);
  },
});
