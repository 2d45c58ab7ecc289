/** A file or a call that libshd refuses; `reason` is a code of spec/REGISTRY.md, or of shd.h. */
export class ShdError extends Error {
  readonly reason: string;
  constructor(reason: string, what: string);
}

export type Dtype =
  | "float32" | "float16" | "bfloat16" | "float64" | "float8_e4m3fn" | "float8_e5m2" | "float8_e8m0fnu" | "bool"
  | "uint8" | "int8" | "uint16" | "int16" | "uint32" | "int32" | "uint64" | "int64" | "float8_e4m3fnuz"
  | "float8_e5m2fnuz" | "complex64";

/** float32 weights are a Float32Array; all others are given by their bits. */
export type Elements = Float32Array | Uint8Array | Uint16Array | Uint32Array | BigUint64Array;

/** Memory of the module, until `Shd.reset()`. */
export interface Block<T extends Elements = Elements> {
  readonly length: number;
  /** A view: to be taken again after any other call, as the memory may have grown. */
  readonly array: T;
}

export interface Weights<T extends Elements = Elements> extends Block<T> {
  readonly dtype: Dtype;
}

/** One tensor's delta. It is checked in full when it is first used: ShdError. */
export interface Tensor {
  readonly name: string;
  /** What it applies to; undefined is float32, float16 and bfloat16. */
  readonly dtype: Dtype | undefined;
  readonly op: "add" | "set" | "ulp" | "new" | "drop" | "replace";
  readonly shape: number[];
  readonly numel: number;
  readonly nnz: number;
  /** Flat positions, [nnz]. */
  positions(): BigInt64Array;
  /** Values of op "add", [nnz]. */
  values(): Float32Array;
  /** Whether these are the weights that the delta was made against, as far as it says. */
  fits(weights: Weights): boolean;
  /** Patches all of a tensor's weights and returns what it overwrote, for `revert`. */
  apply(weights: Weights, strength?: number): Block;
  /** Puts back what `apply` returned, bit for bit. */
  revert(weights: Weights, undo: Block): void;
}

export class Shd {
  /** `wasm` is what wasm/build.sh makes. */
  static instantiate(wasm: BufferSource | WebAssembly.Module): Promise<Shd>;
  /** Opens a file and checks its header and table: tensors by name. ShdError if it is refused. */
  open(bytes: Uint8Array): Map<string, Tensor>;
  /** Weights in the module's memory: so many zeros, or a copy. */
  weights(dtype: "float32", elements: number | Float32Array): Weights<Float32Array>;
  weights(dtype: "float16" | "bfloat16", elements: number | Uint16Array): Weights<Uint16Array>;
  weights(dtype: Dtype, elements: number | Elements): Weights;
  /** Frees everything: files, tensors, weights and undos are no longer to be used. */
  reset(): void;
}
