// Patches a raw weight file with one tensor of a delta, checks that the way back is exact, and writes the result:
//
//     node example.mjs shd.wasm DELTA.shd TENSOR WEIGHTS DTYPE OUTPUT [STRENGTH]

import { readFile, writeFile } from "node:fs/promises";
import { Shd } from "./shd.mjs";

const [wasmPath, deltaPath, name, weightsPath, dtype, outputPath, strength = "1"] = process.argv.slice(2);
const shd = await Shd.instantiate(await readFile(wasmPath));
const tensor = shd.open(await readFile(deltaPath)).get(name);
if (tensor === undefined) throw new Error(`${deltaPath} has no tensor ${name}`);

const file = await readFile(weightsPath);
const Elements = { float32: Float32Array, float16: Uint16Array, bfloat16: Uint16Array }[dtype];
if (Elements === undefined) throw new Error(`${dtype} is no dtype; take float32, float16 or bfloat16`);
const before = new Elements(file.buffer.slice(file.byteOffset, file.byteOffset + file.byteLength));
const weights = shd.weights(dtype, before);
if (!tensor.fits(weights)) throw new Error(`${weightsPath} is not what the delta was made against`);

const undo = tensor.apply(weights, Number(strength));
const patched = weights.array.slice();
tensor.revert(weights, undo);
const bits = (array) => Buffer.from(array.buffer, array.byteOffset, array.byteLength);
if (!bits(weights.array).equals(bits(before))) throw new Error("revert is not exact");

await writeFile(outputPath, bits(patched));
console.log(JSON.stringify({
  ...tensor,
  positions: [...tensor.positions()].map(Number),
  values: tensor.op === "add" ? [...tensor.values()] : undefined,
}));
