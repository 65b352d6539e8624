// A line for each thing that was right, and what came in place of the others.
import { inspect } from "node:util";

export function ok(name, right, what = "") {
  console.log(name, right ? "ok" : `WRONG: ${inspect(what, { depth: 6, breakLength: Infinity })}`);
}

// The error of this kind that a call has to end with.
export async function errorOf(kind, call) {
  let answer;
  try {
    answer = await call();
  } catch (error) {
    if (error instanceof kind) return error;
    throw new Error(`${error.constructor.name} in place of ${kind.name}: ${error.message}`);
  }
  throw new Error(`no ${kind.name}: ${inspect(answer)}`);
}
