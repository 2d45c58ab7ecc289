// The package's entry: `load` finds shd.wasm beside this file, in Node and in browsers.

import { Shd } from "./shd.mjs";

export { Shd, ShdError } from "./shd.mjs";

let compiled; // once for all instances

async function bytes() {
  const url = new URL("./shd.wasm", import.meta.url);
  if (url.protocol === "file:") return (await import("node:fs/promises")).readFile(url);
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}; serve shd.wasm beside index.mjs`);
  return answer.arrayBuffer();
}

export async function load() {
  compiled ??= bytes().then(WebAssembly.compile);
  try {
    return await Shd.instantiate(await compiled);
  } catch (error) {
    compiled = undefined; // to be tried again
    throw error;
  }
}
