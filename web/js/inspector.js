// A click on a map of GM Mixture Inspector chooses the pixel whose mixture is drawn.
//
// The node's picture is ComfyUI's own preview: an <img> in Nodes 2.0, drawn on the canvas in the
// classic design. Its output tells where the maps are on it, and what x and y are at their edges.
import { app } from "../../../scripts/app.js";

const TYPE = "GMFlowInspector";
const PREVIEW = "$$canvas-image-preview"; // ComfyUI's widget of a picture on the canvas
const CAPTION = 15; // pixels for the size that ComfyUI writes below a picture
const CHOICE = "x, y"; // of the input "place"
const NEAR = 4; // pixels that the pointer may move in a click; more is a drag
let pressed = null; // where the button went down

/** Return the maps on a node's picture: { boxes, area }; undefined before it has run. */
const mapsOf = (node) => node.gmflowMaps ?? app.nodeOutputs?.[node.id]?.gmflow_maps?.[0];

/** Choose the pixel under a place on a node's picture, in pixels of the picture. */
function choose(node, px, py) {
  const maps = mapsOf(node);
  const box = maps?.boxes.find(([left, top, width, height]) =>
    px >= left && px < left + width && py >= top && py < top + height);
  if (!box) return false;
  const [left, top, width, height] = box;
  const [x0, x1, y0, y1] = maps.area;
  set(node, "place", CHOICE);
  set(node, "x", round(x0 + ((px - left) / width) * (x1 - x0)));
  set(node, "y", round(y0 + ((py - top) / height) * (y1 - y0)));
  app.canvas?.setDirty(true, true);
  return true;
}

const round = (value) => Math.floor(value * 100) / 100;

function set(node, name, value) {
  const widget = node.widgets?.find((each) => each.name === name);
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value, app.canvas, node);
}

/** Return the place of a click on an <img>, in pixels of its picture. */
function placeOnElement(image, event) {
  const box = image.getBoundingClientRect();
  const { naturalWidth: width, naturalHeight: height } = image;
  const scale = Math.min(box.width / width, box.height / height);
  const left = box.left + (box.width - width * scale) / 2;
  const top = box.top + (box.height - height * scale) / 2;
  return [(event.clientX - left) / scale, (event.clientY - top) / scale];
}

/** Return the place of a click on a picture that the canvas draws, in pixels of the picture. */
function placeOnCanvas(node, event) {
  const [picture] = node.imgs ?? [];
  const widget = node.widgets?.find((each) => each.name === PREVIEW);
  if (!picture || !widget) return null;
  const [gx, gy] = app.canvas.convertEventToCanvasOffset(event);
  const { naturalWidth: width, naturalHeight: height } = picture;
  const caption = app.ui?.settings?.getSettingValue?.("Comfy.Node.AllowImageSizeDraw") ? CAPTION : 0;
  const room = (widget.computedHeight ?? 0) - caption;
  const scale = Math.min(node.size[0] / width, room / height, 1);
  const left = node.pos[0] + (node.size[0] - width * scale) / 2;
  const top = node.pos[1] + (widget.y ?? widget.last_y ?? 0) + (room - height * scale) / 2;
  return [(gx - left) / scale, (gy - top) / scale];
}

function onClick(event) {
  const { target, clientX, clientY } = event;
  const [x, y] = pressed ?? [clientX, clientY];
  if (Math.hypot(clientX - x, clientY - y) > NEAR) return; // the node was moved
  const frame = target.closest?.("[data-node-id]"); // of a node in Nodes 2.0
  if (frame) {
    const node = app.canvas?.graph?.getNodeById(frame.dataset.nodeId);
    if (node?.type !== TYPE) return;
    const image = [...frame.querySelectorAll("img")].find((each) => within(each, event));
    // what lies over the picture, such as a button, has clicks of its own
    if (image && !target.closest("button")) choose(node, ...placeOnElement(image, event));
  } else if (target === app.canvas?.canvas) {
    const [gx, gy] = app.canvas.convertEventToCanvasOffset(event);
    const node = app.canvas.graph?.getNodeOnPos(gx, gy);
    if (node?.type !== TYPE) return;
    const place = placeOnCanvas(node, event);
    if (place) choose(node, ...place);
  }
}

function within(element, event) {
  const { left, right, top, bottom } = element.getBoundingClientRect();
  const { clientX: x, clientY: y } = event;
  return x >= left && x < right && y >= top && y < bottom;
}

app.registerExtension({
  name: "gmflow.inspector",
  setup() {
    const press = ({ clientX, clientY }) => (pressed = [clientX, clientY]);
    document.addEventListener("pointerdown", press, true);
    document.addEventListener("click", onClick, true);
  },
  nodeCreated(node) {
    if (node.comfyClass !== TYPE) return;
    const onExecuted = node.onExecuted;
    node.onExecuted = function (output) {
      onExecuted?.call(this, output);
      this.gmflowMaps = output?.gmflow_maps?.[0];
    };
  },
});
