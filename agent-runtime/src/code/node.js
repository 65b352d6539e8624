// Ratoon's Node: runs cells as node's own REPL does (const, let and await at top level, require from
// the working directory); see code/mod.rs for what is said on descriptor 3.
'use strict';
{
  const { Socket } = require('net');
  const { PassThrough } = require('stream');
  const fs = require('fs');
  const repl = require('repl');
  const util = require('util');
  const vm = require('vm');

  const TEXT_MAX = 1 << 20;
  const LINE_MAX = 8 << 20;
  const control = new Socket({ fd: 3, readable: true, writable: false });
  let interrupted = null; // rejects the cell that runs

  // Whole messages, and in order: waits when the runtime takes them slowly.
  const send = (text) => {
    const bytes = Buffer.from(text + '\n');
    for (let at = 0; at < bytes.length; ) {
      try {
        at += fs.writeSync(3, bytes, at);
      } catch (error) {
        if (error.code !== 'EAGAIN') throw error;
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 5);
      }
    }
  };

  const clip = (text, most) => (text.length > most ? text.slice(0, most) + '…' : text);

  const isPlain = (value) => {
    if (Array.isArray(value)) return true;
    if (value === null || typeof value !== 'object') return false;
    const prototype = Object.getPrototypeOf(value);
    return prototype === null || prototype === Object.prototype;
  };

  const show = (value, result) => {
    const data = { 'text/plain': clip(util.inspect(value), TEXT_MAX) };
    let message = JSON.stringify({ result, data });
    if (isPlain(value)) {
      try {
        const whole = JSON.stringify({ result, data: { ...data, 'application/json': value } });
        if (whole.length < LINE_MAX) message = whole;
      } catch {
        // It has a circle, or a BigInt: the text has to do.
      }
    }
    send('D' + message);
  };

  const explain = (error) => {
    const is = util.types.isNativeError(error) || error instanceof Error;
    const read = (what, otherwise) => {
      try {
        return String(what());
      } catch {
        return otherwise;
      }
    };
    const stack = is ? read(() => error.stack, '') : 'Uncaught ' + read(() => util.inspect(error), '');
    // Our own frames, and those of node's REPL, say nothing about the cell.
    const lines = stack.split('\n').filter((text) => !/\[eval\]|node:repl|node:internal|node:vm|node:domain|node:events/.test(text));
    return {
      name: clip(is ? read(() => error.name, 'Error') : 'Uncaught', 256),
      message: clip(is ? read(() => error.message, '') : read(() => util.inspect(error), ''), 8192),
      traceback: lines.join('\n').slice(-10000),
    };
  };

  const quiet = new PassThrough();
  const server = repl.start({
    prompt: '',
    input: quiet,
    output: process.stderr,
    terminal: false,
    useGlobal: true,
    breakEvalOnSigint: true,
  });
  server.removeAllListeners('SIGINT');
  // The global `process.exit`, timers and so on are node's own: nothing else of the REPL is used.
  globalThis.display = (...values) => values.forEach((value) => show(value, false));

  // What a pipe does not take at once is written before anything else happens.
  for (const stream of [process.stdout, process.stderr]) stream._handle?.setBlocking?.(true);
  const flushed = (stream) => stream.writableLength > 0 && new Promise((done) => stream.write('', done));

  const onInterrupt = () => {
    if (interrupted) interrupted(Object.assign(new Error('interrupted'), { name: 'Interrupted' }));
  };
  process.on('SIGINT', onInterrupt);

  // Errors of a cell and of what it has left behind come here, most of them by the REPL's domain.
  const onError = (error) => {
    if (interrupted) interrupted(error);
    else process.stderr.write(explain(error).traceback + '\n');
  };
  if (server._domain) server._domain.removeAllListeners('error').on('error', onError);
  else process.on('uncaughtException', onError);

  let count = 0;
  const run = async (code) => {
    count += 1;
    let answer = { status: 'ok' };
    try {
      const value = await new Promise((resolve, reject) => {
        interrupted = reject;
        // Node's watchdog for code that does not wait, and a listener, would undo each other.
        process.removeListener('SIGINT', onInterrupt);
        server.eval(code + '\n', server.context, `cell-${count}`, (error, value) => {
          if (!error) resolve({ value });
          else reject(error instanceof repl.Recoverable ? error.err : error);
        });
        process.on('SIGINT', onInterrupt);
      });
      if (value.value !== undefined) {
        globalThis._ = value.value;
        show(value.value, true);
      }
    } catch (error) {
      answer = { status: 'error', error: explain(error) };
    }
    interrupted = null;
    await flushed(process.stdout);
    await flushed(process.stderr);
    send('E' + JSON.stringify(answer));
  };

  // An interrupt that crossed the end of its cell is still on its way: in the event loop, or as the
  // count of a semaphore that Node's next watchdog takes for a new one. Both are let through here.
  const calm = async () => {
    await new Promise((done) => setTimeout(done, 5));
    for (let tries = 0; tries < 8; tries += 1) {
      try {
        const wait = 'Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 10)';
        process.removeListener('SIGINT', onInterrupt);
        vm.runInThisContext(wait, { breakOnSigint: true });
        break;
      } catch {
        // That was one.
      } finally {
        process.on('SIGINT', onInterrupt);
      }
    }
    send('C');
  };

  // The machine has become another one. V8's Math.random cannot be seeded, nor can node's OpenSSL, whose
  // state a sibling has too: from now on both are replaced by the kernel's numbers, which differ.
  const urandom = (bytes) => {
    const file = fs.openSync('/dev/urandom', 'r');
    try {
      for (let at = 0; at < bytes.length; ) at += fs.readSync(file, bytes, at, bytes.length - at);
    } finally {
      fs.closeSync(file);
    }
    return bytes;
  };
  let state = null; // of Math.random: xorshift128, 32 bits at a time
  const next = () => {
    const old = state[3] ^ (state[3] << 11);
    state.copyWithin(1, 0, 3);
    state[0] = state[1] ^ (state[1] >>> 19) ^ old ^ (old >>> 8);
    return state[0];
  };
  const reseed = () => {
    const isFirst = state === null;
    state = new Uint32Array(urandom(new Uint8Array(16)).buffer);
    if (!state.some((word) => word)) state[0] = 1;
    if (!isFirst) return;
    Math.random = function random() {
      return ((next() >>> 5) * 0x4000000 + (next() >>> 6)) / 0x20000000000000;
    };
    replaceCrypto(require('crypto'));
    require('module').syncBuiltinESMExports();
  };
  // Node's own functions check what they are given and make the answer; its content is then replaced.
  const replaceCrypto = (crypto) => {
    const { randomBytes, randomFill, randomFillSync, randomInt } = crypto;
    const fill = (buffer, offset = 0, size = undefined) => {
      const unit = ArrayBuffer.isView(buffer) ? buffer.BYTES_PER_ELEMENT || 1 : 1;
      const [data, from] = ArrayBuffer.isView(buffer) ? [buffer.buffer, buffer.byteOffset] : [buffer, 0];
      const bytes = new Uint8Array(data, from, buffer.byteLength);
      urandom(bytes.subarray(offset * unit, size === undefined ? undefined : (offset + size) * unit));
      return buffer;
    };
    const split = (args) => (typeof args.at(-1) === 'function' ? [args.slice(0, -1), args.at(-1)] : [args]);
    crypto.randomBytes = crypto.pseudoRandomBytes = (...all) => {
      const [args, callback] = split(all);
      if (!callback) return fill(randomBytes(...args));
      randomBytes(...args, (error, bytes) => callback(error, bytes && fill(bytes)));
    };
    crypto.randomFillSync = (...args) => {
      randomFillSync(...args);
      return fill(...args);
    };
    crypto.randomFill = (...all) => {
      const [args, callback] = split(all);
      randomFill(...args, callback && ((error, buffer) => callback(error, buffer && fill(...args))));
    };
    crypto.randomInt = (...all) => {
      const [args, callback] = split(all);
      randomInt(...args);
      const [low, high] = args.length > 1 ? args : [0, args[0]];
      const most = 2 ** 48 - (2 ** 48 % (high - low));
      let number = most;
      while (number >= most) number = urandom(Buffer.alloc(6)).readUIntBE(0, 6);
      number = low + (number % (high - low));
      if (!callback) return number;
      process.nextTick(callback, undefined, number);
    };
    crypto.randomUUID = () => {
      const bytes = urandom(Buffer.alloc(16));
      bytes[6] = (bytes[6] & 0x0f) | 0x40;
      bytes[8] = (bytes[8] & 0x3f) | 0x80;
      return bytes.toString('hex').replace(/^(.{8})(.{4})(.{4})(.{4})/, '$1-$2-$3-$4-');
    };
    const web = Object.getPrototypeOf(crypto.webcrypto);
    const { getRandomValues } = web;
    web.getRandomValues = function (array) {
      return fill(getRandomValues.call(this, array));
    };
    web.randomUUID = () => crypto.randomUUID();
  };

  let rest = [];
  control.on('data', (bytes) => {
    rest.push(bytes);
    if (bytes[bytes.length - 1] !== 10) return;
    const lines = Buffer.concat(rest).toString().split('\n');
    rest = [];
    for (const line of lines) {
      if (!line) continue;
      const request = JSON.parse(line);
      if ('run' in request) run(request.run);
      if ('calm' in request) calm();
      if ('reseed' in request) reseed();
    }
  });
  control.on('end', () => process.exit(0));
  control.on('error', () => process.exit(1));
  send('H');
}
