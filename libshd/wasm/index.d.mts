import type { Shd } from "./shd.mjs";

export * from "./shd.mjs";

/** A new instance of the module, with memory of its own; shd.wasm is read once, from beside index.mjs. */
export function load(): Promise<Shd>;
