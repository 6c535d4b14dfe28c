// Messages of GMFlow's nodes, whole, on the node that they are about.
//
// The server sends what a node says while it runs, and is asked for what the nodes of a prompt said
// when their results were made: at its start and end, and when a workflow is opened. Each node with
// messages gets a widget below all others, which is no part of a saved workflow. Other packs' nodes
// that run our samplers get one too, and so does a subgraph around a node.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const EVENT = "gmflow/messages";
const NAME = "gmflow_messages"; // of the widget
const MARGIN = 8; // pixels around the widget in the classic design
const TALLEST = 600; // pixels of text; the rest is scrolled to
const COLOURS = { warning: "#d08a1e", info: "#6b7a8f" };

const said = new Map(); // execution id of a node -> { type, messages: [[text, level]] }
const changed = new Map(); // the same id -> when the server sent its messages last
const signs = new Map(); // node -> its widget, elements, and heights
let clock = 0;
let workflow = null; // id of the workflow that `said` is about

const rootGraph = () => app.rootGraph ?? app.graph;

/** Return the nodes that lead to an execution id such as "5:3", the outermost first. */
function pathTo(id) {
  const path = [];
  let graph = rootGraph();
  for (const part of String(id).split(":")) {
    const node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part));
    if (!node) return [];
    path.push(node);
    graph = node.subgraph;
  }
  return path;
}

/** Show `said` on the nodes of the workflow, and nothing on all others. */
function render() {
  const wanted = new Map();
  const want = (node, messages) => wanted.set(node, [...(wanted.get(node) ?? []), ...messages]);
  for (const [id, { type, messages }] of said) {
    const path = pathTo(id);
    const node = path.pop();
    if (!node || (type && node.type !== type)) continue;
    want(node, messages);
    const within = messages.map(([text, level]) => [`${node.title}: ${text}`, level]);
    for (const outer of path) want(outer, within);
  }
  for (const node of [...signs.keys()]) if (!wanted.has(node)) takeDown(node);
  for (const [node, messages] of wanted) putUp(node, messages);
  const redraw = () => app.canvas?.setDirty(true, true);
  redraw();
  setTimeout(redraw, 300); // a node with a preview has found its height by then
}

/** Put messages on a node, in the place of those on it. */
function putUp(node, messages) {
  const sign = signs.get(node) ?? newSign(node);
  const text = JSON.stringify(messages);
  if (sign.shown === text) return;
  sign.shown = text;
  sign.list.replaceChildren(...messages.map(([message, level]) => line(message, level)));
  setHeight(node, sign, sign.list.offsetHeight || estimate(node, messages));
}

/** Remove the messages and their widget from a node. */
function takeDown(node) {
  const sign = signs.get(node);
  signs.delete(node);
  sign.observer.disconnect();
  setHeight(node, sign, 0);
  if (node.widgets?.includes(sign.widget)) node.removeWidget(sign.widget);
}

function newSign(node) {
  const list = document.createElement("div");
  Object.assign(list.style, {
    maxHeight: `${TALLEST}px`,
    overflowY: "auto",
    userSelect: "text",
    cursor: "text",
  });
  const element = document.createElement("div"); // ComfyUI gives it a size
  element.dataset.testid = NAME;
  element.style.overflow = "hidden";
  element.append(list);
  const bare = !node.widgets?.length; // a node without widgets saves no values of widgets
  const sign = { list, element, bare, height: 0, grown: 0, shown: "" };
  sign.widget = node.addDOMWidget(NAME, NAME, element, {
    serialize: false,
    hideInPanel: true,
    margin: MARGIN,
    getValue: () => "",
    setValue: () => {},
  });
  sign.widget.serialize = false;
  // a fixed height: with that of a layout, the newer design shares a node's free room with it
  sign.widget.computeLayoutSize = undefined;
  sign.widget.computeSize = () => [0, sign.height];
  sign.observer = new ResizeObserver(() => {
    if (signs.get(node) === sign && list.offsetHeight) setHeight(node, sign, list.offsetHeight);
  });
  sign.observer.observe(list);
  signs.set(node, sign);
  keepOutOfFiles(node);
  return sign;
}

/** Return the element of one message. */
function line(message, level) {
  const element = document.createElement("div");
  element.textContent = message;
  Object.assign(element.style, {
    font: "12px/1.35 sans-serif",
    color: "var(--input-text, var(--fg-color, #ddd))",
    background: "var(--comfy-input-bg, #222)",
    borderLeft: `3px solid ${COLOURS[level] ?? COLOURS.info}`,
    borderRadius: "4px",
    padding: "4px 6px",
    marginBottom: "4px",
    whiteSpace: "pre-wrap",
    overflowWrap: "anywhere",
  });
  return element;
}

/** Return the likely height of messages on a node that is not drawn now. */
function estimate(node, messages) {
  const columns = Math.max((node.size[0] - 2 * MARGIN - 16) / 6.4, 8);
  const rows = messages.map(([message]) => Math.ceil(message.length / columns));
  return Math.min(rows.reduce((sum, each) => sum + each * 16.2 + 12, 0), TALLEST);
}

/** Give the widget the height of its text, and the node as much more as it has no room for. */
function setHeight(node, sign, text) {
  const height = text ? Math.ceil(text) + 2 * MARGIN : 0;
  const less = Math.min(sign.height - height, sign.grown); // that the node may shrink by
  if (height === sign.height) return;
  sign.height = height;
  const own = node.size[1] - sign.grown; // without the widget
  if (!window.LiteGraph?.vueNodesMode) {
    const needed = height ? node.computeSize()[1] : own;
    sign.grown = Math.max(needed - own, 0);
    node.setSize([node.size[0], own + sign.grown]);
  } else if (less > 0) {
    sign.grown -= less;
    node.setSize([node.size[0], own + sign.grown]);
  } else {
    // nodes of the newer design grow with what is in them
    setTimeout(() => {
      sign.grown = Math.min(Math.max(node.size[1] - own, 0), sign.height);
    }, 300);
  }
  node.setDirtyCanvas?.(true, true);
}

/** Save a node as it is without messages. */
function keepOutOfFiles(node) {
  if (node.gmflowMessages) return;
  node.gmflowMessages = true;
  const onSerialize = node.onSerialize;
  node.onSerialize = function (data) {
    onSerialize?.call(this, data);
    const { grown, bare } = signs.get(this) ?? {};
    if (grown && data.size) data.size = [data.size[0], Math.max(data.size[1] - grown, 0)];
    if (bare && data.widgets_values?.length === 0) {
      delete data.widgets_values;
      delete data.widgets_values_named;
    }
  };
}

/** Ask the server what the nodes of a prompt, or of a workflow's latest prompt, have said. */
async function ask(about) {
  const asked = ++clock;
  const query = new URLSearchParams({ client_id: api.clientId ?? "", ...about });
  try {
    const response = await api.fetchApi(`/${EVENT}?${query}`, { cache: "no-store" });
    if (!response.ok) return;
    const answer = await response.json();
    if (answer.workflow !== rootGraph()?.id) return;
    const newer = (id) => (changed.get(id) ?? 0) > asked;
    for (const id of [...said.keys()]) if (!newer(id)) said.delete(id);
    for (const [id, each] of Object.entries(answer.messages)) if (!newer(id)) said.set(id, each);
    render();
  } catch (error) {
    console.warn("GMFlow: the messages of nodes could not be read:", error);
  }
}

function hear({ detail }) {
  if (detail.workflow !== rootGraph()?.id) return; // of another tab
  changed.set(detail.node, ++clock);
  if (detail.messages.length) said.set(detail.node, detail);
  else said.delete(detail.node);
  render();
}

const PROMPT_EVENTS = [
  "execution_start",
  "execution_success",
  "execution_error",
  "execution_interrupted",
];

app.registerExtension({
  name: "gmflow.messages",
  setup() {
    api.addEventListener(EVENT, hear);
    for (const name of PROMPT_EVENTS) {
      api.addEventListener(name, ({ detail }) => ask({ prompt_id: detail.prompt_id }));
    }
    // the server may have started anew, and knows this page by what it asks
    let client;
    api.addEventListener("reconnected", () => ask({ workflow_id: workflow ?? "" }));
    api.addEventListener("status", () => {
      if (api.clientId === client) return;
      client = api.clientId;
      ask({ workflow_id: workflow ?? "" });
    });
  },
  afterConfigureGraph() {
    if (workflow !== rootGraph()?.id) said.clear();
    workflow = rootGraph()?.id ?? null;
    render();
    if (workflow) ask({ workflow_id: workflow });
  },
});
