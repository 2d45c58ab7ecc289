// Opens .shd files, decodes their tensors and patches weights with them, in WebAssembly: libshd without the plumbing.
// What all of this is for stands in shd.d.mts.

const DTYPES = [
  undefined, "float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "bool",
  "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float8_e4m3fnuz", "float8_e5m2fnuz",
  "complex64",
];
const OPS = ["add", "set", "ulp", "new", "drop", undefined, "replace"];
const ARRAYS = { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array, 8: BigUint64Array };
const FILE = 1, TENSOR = 2, DELTA = 3; // enum shd_struct
const ALIGNMENT = 16;
const PAGE = 65536;

export class ShdError extends Error {
  constructor(reason, what) {
    super(`${what}: ${reason}`);
    this.name = "ShdError";
    this.reason = reason;
  }
}

/** Memory of the module. Its array is made anew each time, as those before are lost when the memory grows. */
class Block {
  constructor(memory, address, type, length) {
    Object.assign(this, { memory, address, type, length });
  }

  get array() {
    return new this.type(this.memory.buffer, this.address, this.length);
  }
}

export class Shd {
  #exports;
  #end; // of the memory that is in use

  constructor(instance) {
    this.#exports = instance.exports;
    this.reset();
  }

  static async instantiate(wasm) {
    const module = wasm instanceof WebAssembly.Module ? wasm : await WebAssembly.compile(wasm);
    return new Shd(await WebAssembly.instantiate(module));
  }

  reset() {
    this.#end = this.#exports.__heap_base.value;
  }

  #take(type, length) {
    const { memory } = this.#exports;
    const address = Math.ceil(this.#end / ALIGNMENT) * ALIGNMENT;
    const end = address + length * type.BYTES_PER_ELEMENT;
    const missing = Math.ceil((end - memory.buffer.byteLength) / PAGE);
    if (missing > 0) memory.grow(missing); // throws a RangeError where there is no more
    this.#end = end;
    return new Block(memory, address, type, length);
  }

  #struct(which) {
    return this.#take(Uint8Array, this.#exports.struct_size(which)).address;
  }

  #text(address, size) {
    return new TextDecoder().decode(new Uint8Array(this.#exports.memory.buffer, address >>> 0, size));
  }

  #check(code, what) {
    if (code === 0) return;
    const bytes = new Uint8Array(this.#exports.memory.buffer);
    const address = this.#exports.error_name(code) >>> 0;
    throw new ShdError(this.#text(address, bytes.indexOf(0, address) - address), what);
  }

  weights(dtype, elements) {
    const id = DTYPES.indexOf(dtype, 1);
    if (id < 0) throw new TypeError(`${dtype} is no dtype`);
    const type = dtype === "float32" ? Float32Array : ARRAYS[this.#exports.dtype_size(id)];
    const block = this.#take(type, typeof elements === "number" ? elements : elements.length);
    if (typeof elements === "number") block.array.fill(type === BigUint64Array ? 0n : 0);
    else block.array.set(elements);
    return Object.assign(block, { dtype });
  }

  open(bytes) {
    const wasm = this.#exports;
    const data = this.#take(Uint8Array, bytes.length);
    data.array.set(bytes);
    const file = this.#struct(FILE);
    this.#check(wasm.open(file, data.address, data.length), "the file");
    const tensors = new Map();
    const tensor = this.#struct(TENSOR);
    for (let number = 0; number < wasm.tensor_count(file); number++) {
      this.#check(wasm.tensor_at(file, number, tensor), "the file");
      const found = this.#describe(tensor);
      const scratchSize = wasm.scratch_size(file, tensor);
      let delta; // made ready when it is first needed
      const ready = () => {
        if (delta === undefined) {
          const address = this.#struct(DELTA);
          const scratch = this.#take(Uint8Array, scratchSize);
          this.#check(wasm.load(file, number, scratch.address, scratchSize, address), found.name);
          delta = address;
        }
        return delta;
      };
      tensors.set(found.name, Object.assign(found, this.#actions(found, ready)));
    }
    return tensors;
  }

  #describe(tensor) {
    const wasm = this.#exports;
    return {
      name: this.#text(wasm.name(tensor), wasm.name_size(tensor)),
      dtype: DTYPES[wasm.dtype(tensor)],
      op: OPS[wasm.op(tensor)],
      shape: Array.from({ length: wasm.rank(tensor) }, (_, i) => wasm.dim(tensor, i)),
      numel: wasm.numel(tensor),
      nnz: wasm.nnz(tensor),
    };
  }

  #actions(tensor, ready) {
    const wasm = this.#exports;
    const check = (code) => this.#check(code, tensor.name);
    const target = (weights) => [weights.address, weights.length, DTYPES.indexOf(weights.dtype, 1)];
    const copyOut = (type, decode) => {
      const delta = ready();
      const start = this.#end;
      const block = this.#take(type, tensor.nnz);
      try {
        check(decode(delta, block.address));
        return block.array.slice();
      } finally {
        this.#end = start;
      }
    };
    return {
      positions: () => copyOut(BigInt64Array, wasm.positions),
      values: () => copyOut(Float32Array, wasm.values),
      fits: (weights) => weights.length === tensor.numel && wasm.fits(ready(), ...target(weights)) === 1,
      apply: (weights, strength = 1) => {
        const delta = ready();
        const undo = this.#take(weights.type, tensor.nnz);
        check(wasm.apply(delta, ...target(weights), strength, undo.address));
        return undo;
      },
      revert: (weights, undo) => {
        if (undo.length !== tensor.nnz || undo.type !== weights.type) throw new TypeError("this undo is another's");
        check(wasm.revert(ready(), ...target(weights), undo.address));
      },
    };
  }
}
