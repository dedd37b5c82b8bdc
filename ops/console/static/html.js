// Preact with htm's templates in place of JSX: no build step.
import { Component, h, render } from "/ops/vendor/preact.mjs";
import htm from "/ops/vendor/htm.mjs";

export const html = htm.bind(h);
export { Component, render };
