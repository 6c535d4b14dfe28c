"""Measure how a workflow lies in the page: nodes over nodes, links behind nodes, torn groups."""

from __future__ import annotations

from typing import Any

from .page import ComfyPage

LOAD = """async (data) => {
  const own = window.app.extensionManager.workflow.activeWorkflow;
  await window.app.loadGraphData(data, true, false, own);
}"""
# The page draws only what is in sight, so that the whole workflow has to be.
FIT = """() => {
  const {ds, canvas} = window.app.canvas, nodes = window.app.canvas.graph.nodes;
  const right = Math.max(...nodes.map((node) => node.pos[0] + node.size[0])) + 80;
  const bottom = Math.max(...nodes.map((node) => node.pos[1] + node.size[1])) + 160;
  ds.scale = Math.min(canvas.clientWidth / right, canvas.clientHeight / bottom, 1);
  ds.offset[0] = 20;
  ds.offset[1] = 80;
  window.app.canvas.setDirty(true, true);
}"""
# Until no node has moved or grown for some frames; Nodes 2.0 measures its nodes after it drew them.
SETTLE = """async () => {
  const FRAMES = 8, MOST = 600;
  const {nodes} = window.app.canvas.graph;
  let before = '', same = 0;
  for (let frame = 0; frame < MOST && same < FRAMES; frame++) {
    await new Promise(requestAnimationFrame);
    const drawn = [...document.querySelectorAll('.lg-node')].map((each) => {
      const {x, y, width, height} = each.getBoundingClientRect();
      return [x, y, width, height].map(Math.round);
    });
    const whole = !window.LiteGraph.vueNodesMode || drawn.length === nodes.length;
    const now = JSON.stringify([drawn, nodes.map(({pos, size}) => [...pos, ...size])]);
    same = whole && now === before ? same + 1 : 0;
    before = now;
  }
}"""
# Boxes include the title bars, and what a run adds to a sampler: its message and its preview (as
# measured, in the design where they need more). A link may touch the nodes that it joins, in a
# narrow rim.
FAULTS = """() => {
  const RIM = 14, TITLE = 30, STEP = 2, COARSE = 24, WIDTH = 3;
  const ADDED = {GMFlowSampler: 270, KSampler: 240, SamplerCustomAdvanced: 275};
  const canvas = window.app.canvas, graph = window.app.rootGraph ?? canvas.graph;
  canvas.draw(true, true);
  const faults = [];
  const boxes = graph.nodes.map((node) => {
    const drawn = document.querySelector(`.lg-node[data-node-id="${node.id}"]`);
    const seen = drawn?.getBoundingClientRect(), scale = canvas.ds.scale;
    const height = Math.max(node.size[1], seen ? seen.height / scale - TITLE : 0);
    const width = Math.max(node.size[0], seen ? seen.width / scale : 0);
    const [left, top] = node.pos;
    const bottom = top + height + (ADDED[node.type] ?? 0);
    return {node, left, top: top - TITLE, right: left + width, bottom};
  });
  const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top
    || b.bottom <= a.top;
  boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b) => {
    if (!apart(a, b)) faults.push(`${a.node.title} and ${b.node.title} overlap`);
  }));
  const groups = graph.groups.map(({title, pos, size}) => ({
    title, left: pos[0], top: pos[1], right: pos[0] + size[0], bottom: pos[1] + size[1]}));
  for (const box of boxes) {
    const touched = groups.filter((group) => !apart(box, group));
    for (const group of touched) {
      const inside = box.left >= group.left && box.right <= group.right
        && box.top >= group.top && box.bottom <= group.bottom;
      if (!inside) faults.push(`${box.node.title} is only partly in the group ${group.title}`);
    }
    const note = /Note$/.test(box.node.type);
    if (!note && touched.length != 1) {
      faults.push(`${box.node.title} is in ${touched.length} groups`);
    }
  }
  const context = document.createElement('canvas').getContext('2d');
  context.lineCap = 'round';
  const onBorder = (path, width, step, {left, top, right, bottom}, rim) => {
    context.lineWidth = width;
    const crossed = (x, y) => context.isPointInStroke(path, x, y);
    const [x0, y0, x1, y1] = [left + rim, top + rim, right - rim, bottom - rim];
    for (let x = x0; x < x1 + step; x += step) {
      if (crossed(Math.min(x, x1), y0) || crossed(Math.min(x, x1), y1)) return true;
    }
    for (let y = y0; y < y1 + step; y += step) {
      if (crossed(x0, Math.min(y, y1)) || crossed(x1, Math.min(y, y1))) return true;
    }
    return false;
  };
  for (const segment of canvas.renderedPaths) {
    if (!segment.path) continue;
    const ids = segment.linkIds ? [...segment.linkIds] : [segment.id];
    const links = ids.map((id) => graph.links.get(id)).filter(Boolean);
    for (const box of boxes) {
      const {node} = box;
      const own = links.some((link) => [link.origin_id, link.target_id].map(String)
        .includes(String(node.id)));
      const rim = own ? RIM : 0;
      // a broad stroke at few points first: where it is far from all, so is the link
      const behind = onBorder(segment.path, WIDTH + COARSE, COARSE, box, rim)
        && onBorder(segment.path, WIDTH, STEP, box, rim);
      if (behind) {
        const names = links.map((link) => `${graph.getNodeById(link.origin_id).title} > `
          + graph.getNodeById(link.target_id).title);
        faults.push(`the link ${names} runs behind ${node.title}`);
      }
    }
  }
  const drawn = document.querySelectorAll('.lg-node').length;
  return {faults, links: canvas.renderedPaths.size, drawn};
}"""


def load(page: ComfyPage, workflow: dict[str, Any]) -> None:
    """Open a workflow in the page's active tab."""
    page.page.evaluate(LOAD, workflow)


def layout_faults(page: ComfyPage) -> dict[str, Any]:
    """Return what is wrong with the layout of the open workflow, as the page draws it.

    Returns:
        faults: a sentence for each; links: the drawn links and reroutes; drawn: the nodes that
        Nodes 2.0 has drawn, 0 in the classic design.
    """
    page.page.evaluate(FIT)
    page.page.evaluate(SETTLE)
    return page.page.evaluate(FAULTS)
