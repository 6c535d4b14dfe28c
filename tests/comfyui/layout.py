"""Measure how a workflow lies in the page: nodes over nodes, links behind nodes, torn groups."""

from __future__ import annotations

from typing import Any

from .page import ComfyPage

SETTLED = 700  # ms until the page has drawn a loaded graph, and Nodes 2.0 has measured its nodes
LOAD = """async (data) => {
  const own = window.app.extensionManager.workflow.activeWorkflow;
  await window.app.loadGraphData(data, true, false, own);
}"""
SWITCH = "(on) => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
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
# Boxes include the title bars, and what a run adds to a sampler: its message and its preview (as
# measured, in the design where they need more). A link may touch the nodes that it joins, in a
# narrow rim.
FAULTS = """() => {
  const RIM = 14, TITLE = 30, STEP = 2;
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
  context.lineWidth = 3;
  for (const segment of canvas.renderedPaths) {
    if (!segment.path) continue;
    const ids = segment.linkIds ? [...segment.linkIds] : [segment.id];
    const links = ids.map((id) => graph.links.get(id)).filter(Boolean);
    for (const {node, left, top, right, bottom} of boxes) {
      const own = links.some((link) => [link.origin_id, link.target_id].map(String)
        .includes(String(node.id)));
      const rim = own ? RIM : 0;
      const crossed = (x, y) => context.isPointInStroke(segment.path, x, y);
      let behind = false;
      for (let x = left + rim; x <= right - rim && !behind; x += STEP) {
        behind = crossed(x, top + rim) || crossed(x, bottom - rim);
      }
      for (let y = top + rim; y <= bottom - rim && !behind; y += STEP) {
        behind = crossed(left + rim, y) || crossed(right - rim, y);
      }
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


def use_nodes_2(page: ComfyPage, on: bool) -> None:
    """Switch the page to Nodes 2.0, or back to the classic design."""
    page.page.evaluate(SWITCH, on)
    page.page.wait_for_timeout(SETTLED)


def load(page: ComfyPage, workflow: dict[str, Any]) -> None:
    """Open a workflow in the page's active tab."""
    page.page.evaluate(LOAD, workflow)
    page.page.evaluate(FIT)
    page.page.wait_for_timeout(SETTLED)


def layout_faults(page: ComfyPage) -> dict[str, Any]:
    """Return what is wrong with the layout of the open workflow, as the page draws it.

    Returns:
        faults: a sentence for each; links: the drawn links and reroutes; drawn: the nodes that
        Nodes 2.0 has drawn, 0 in the classic design.
    """
    return page.page.evaluate(FAULTS)
