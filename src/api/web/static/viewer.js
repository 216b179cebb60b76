/**
 * The pictures of a generation at full size, with zoom: by buttons, keyboard, wheel, double click, drag and pinch.
 *
 * @typedef {import("./pictures.js").Picture & {ownUrl: string}} Picture
 */

import { byId, setImage, setText } from "./dom.js";
import { formatPercent, t } from "./i18n.js";

const MAX_ZOOM = 8;
/** By how much a key or a button zooms, and by how many pixels a key moves the picture. */
const [STEP, MOVE] = [1.5, 80];

let pictures = /** @type {Picture[]} */ ([]);
let index = 0;
let title = "";
/** The scale, and where the centre of the picture is, in pixels from the centre of the room. */
let view = { scale: 1, x: 0, y: 0 };
/** Where the fingers are, or the mouse while it is pressed. @type {Map<number, {x: number, y: number}>} */
const pointers = new Map();

/** Applies a view. The picture cannot be moved out of the room. */
function show({ scale, x, y } = { scale: 1, x: 0, y: 0 }) {
  const [room, image] = [byId("viewer-room"), byId("viewer-image")];
  const { clientWidth: width, clientHeight: height } = room;
  const fit = Math.min(width / image.naturalWidth, height / image.naturalHeight) || 1;
  const clamp = (/** @type {number} */ value, /** @type {number} */ size, /** @type {number} */ space) => {
    const most = Math.max(0, (size * fit * scale - space) / 2);
    return Math.min(most, Math.max(-most, value));
  };
  view = { scale, x: clamp(x, image.naturalWidth, width), y: clamp(y, image.naturalHeight, height) };
  image.style.transform = `translate(${view.x}px, ${view.y}px) scale(${scale})`;
  room.classList.toggle("zoomed", scale > 1);
  setText(byId("viewer-zoom"), formatPercent(Math.round(scale * 100)));
}

/** Zooms around a point of the screen, by default the centre. */
function zoom(/** @type {number} */ factor, /** @type {{x: number, y: number} | undefined} */ point = undefined) {
  const { left, top, width, height } = byId("viewer-room").getBoundingClientRect();
  const [x, y] = point ? [point.x - left - width / 2, point.y - top - height / 2] : [0, 0];
  const scale = Math.min(MAX_ZOOM, Math.max(1, view.scale * factor));
  const ratio = scale / view.scale;
  show({ scale, x: x - (x - view.x) * ratio, y: y - (y - view.y) * ratio });
}

const move = (/** @type {number} */ x, /** @type {number} */ y) => show({ ...view, x: view.x + x, y: view.y + y });

/** Shows another picture of the generation. */
function choose(/** @type {number} */ next) {
  index = (next + pictures.length) % pictures.length;
  const { name, ownUrl } = pictures[index];
  setImage(byId("viewer-image"), ownUrl, `${t(name)}: ${title}`);
  [...byId("viewer-names").children].forEach((button, at) => button.setAttribute("aria-pressed", String(at === index)));
  show();
}

/** @param {Picture[]} shown @param {string} named the title of the generation */
export function open(shown, named) {
  [pictures, title] = [shown, named];
  byId("viewer-names").replaceChildren(...shown.map(({ name }, at) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: t(name) });
    button.addEventListener("click", () => choose(at));
    return button;
  }));
  byId("viewer-names").hidden = shown.length < 2;
  byId("viewer").setAttribute("aria-label", t("pictureOf")(named));
  byId("viewer").showModal();
  choose(shown.length - 1);
  byId("viewer-room").focus();
}

const KEYS = /** @type {Record<string, () => void>} */ ({
  "+": () => zoom(STEP), "=": () => zoom(STEP), "-": () => zoom(1 / STEP), 0: () => show(),
  ArrowLeft: () => (view.scale > 1 ? move(MOVE, 0) : choose(index - 1)),
  ArrowRight: () => (view.scale > 1 ? move(-MOVE, 0) : choose(index + 1)),
  ArrowUp: () => move(0, MOVE), ArrowDown: () => move(0, -MOVE),
});

/** Moves with one pointer, zooms with two. @param {PointerEvent} event */
function onPointerMove({ pointerId, clientX, clientY }) {
  const before = pointers.get(pointerId);
  if (!before) return;
  const [first, second] = [...pointers.values()];
  const [now, other] = [{ x: clientX, y: clientY }, before === first ? second : first];
  move((now.x - before.x) / pointers.size, (now.y - before.y) / pointers.size);
  if (other) {
    const distance = (/** @type {typeof now} */ point) => Math.hypot(point.x - other.x, point.y - other.y);
    zoom(distance(now) / (distance(before) || 1), { x: (now.x + other.x) / 2, y: (now.y + other.y) / 2 });
  }
  pointers.set(pointerId, now);
}

export function init() {
  const [dialog, room] = [byId("viewer"), byId("viewer-room")];
  dialog.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
    event.preventDefault();
    KEYS[event.key]();
  });
  byId("viewer-image").addEventListener("load", () => show());
  addEventListener("resize", () => dialog.open && show(view));
  room.addEventListener("wheel", (/** @type {WheelEvent} */ event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), { x: event.clientX, y: event.clientY });
  }, { passive: false });
  room.addEventListener("dblclick", (/** @type {MouseEvent} */ { clientX: x, clientY: y }) => {
    if (view.scale > 1) show();
    else zoom(STEP ** 3, { x, y });
  });
  room.addEventListener("pointerdown", (/** @type {PointerEvent} */ event) => {
    if (pointers.size > 1) return;
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    room.setPointerCapture(event.pointerId);
  });
  room.addEventListener("pointermove", onPointerMove);
  for (const name of ["pointerup", "pointercancel"]) {
    room.addEventListener(name, (/** @type {PointerEvent} */ { pointerId }) => pointers.delete(pointerId));
  }
  byId("viewer-in").addEventListener("click", () => zoom(STEP));
  byId("viewer-out").addEventListener("click", () => zoom(1 / STEP));
  byId("viewer-fit").addEventListener("click", () => show());
  byId("viewer-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => (pointers.clear(), setImage(byId("viewer-image"), undefined)));
}
