// Streams a completion from a blinkimp server over ZeroMQ: node minimal_zmq.mjs 127.0.0.1 5555 'def read_file(path):'
// Node 18 or newer, no packages: ZMTP 3.0 (rfc.zeromq.org/spec/23) and msgpack by hand; what goes over them is in nic_shim/PROTOCOL.md.
// Test: pytest tests/host/test_examples.py
import { connect } from "node:net";
const [host, port, prompt] = process.argv.slice(2), socket = connect(port, host), bytes = (text) => Buffer.from(text, "latin1");
const big = (n, size) => Buffer.from(n.toString(16).padStart(2 * size, "0"), "hex"), utf8 = Buffer.from(prompt);
const submit = "\x84\xa4type\xa6submit\xa2id\x01\xa8sampling\x82\xabtemperature\x00\xaamax_tokens\x20\xa6prompt\xdb"; // a map of 4
const body = Buffer.concat([bytes(submit), big(utf8.length, 4), utf8]), ready = "\x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06DEALER";
socket.write(bytes("\xff" + "\0".repeat(8) + "\x7f\x03\0NULL" + "\0".repeat(48))); // a greeting of 64 bytes; the rest once the server's is here
const number = (size) => parseInt(take(size).toString("hex"), 16), many = (n, one) => Array.from({ length: n }, () => one());
const value = (c = take(1)[0]) => c < 0x80 ? c : c < 0x90 ? map(c & 15) : c < 0xa0 ? many(c & 15, value) : c < 0xc0 ? take(c & 31).toString()
  : c < 0xc4 ? c === 0xc3 : c === 0xcb ? take(8).readDoubleBE() : c < 0xd0 ? number(1 << (c & 3)) : c < 0xdc ? take(number(1 << (c - 0xd9))).toString()
  : c === 0xdc ? many(number(2), value) : map(number(2)), map = (n) => Object.fromEntries(many(n, () => [value(), value()])); // msgpack
let data = Buffer.alloc(0), rest = [bytes(ready), bytes("\x02"), big(body.length, 8), body], at = 64, end = 0, take = (n) => data.subarray(at, (at += n));
for await (const piece of socket) {
  if ((data = Buffer.concat([data, piece])).length >= 64 && rest.length) socket.write(Buffer.concat(rest.splice(0)));
  for (; data.length >= at + 9; at = end) { // a frame: flags, size, body
    const [flags, size] = data[at] & 2 ? [take(1)[0], number(8)] : [take(1)[0], number(1)]; if (data.length < (end = at + size)) { at -= flags & 2 ? 9 : 2; break; } // its end is still on the way
    for (const message of flags & 4 ? [] : value()) // flag 4: a command, no message
      message.type === "tokens" ? process.stdout.write(message.text) : message.type === "finish" ? socket.end()
        : message.final && (console.error(message.what), (process.exitCode = 1), socket.end());
  }
}
