// Streams a completion from a blinkimp server over HTTP: node minimal_http.mjs http://127.0.0.1:8000 'def read_file(path):'
// Node 18 or newer, no packages. Test: pytest tests/host/test_examples.py
const [url, prompt] = process.argv.slice(2);
const reply = await fetch(`${url}/v1/completions`, {
  method: "POST",
  body: JSON.stringify({ prompt, max_tokens: 32, temperature: 0, stream: true }),
});
if (!reply.ok) throw new Error((await reply.json()).error.message);
let rest = "";
for await (const piece of reply.body.pipeThrough(new TextDecoderStream())) {
  const events = (rest + piece).split("\n\n");
  rest = events.pop();
  for (const event of events)
    if (event !== "data: [DONE]") process.stdout.write(JSON.parse(event.slice(6)).choices[0].text);
}
