// What the checks of all packages share: what they ask of which server, and how a check is told.
export const { BASE_URL, MODEL, EMBED_MODEL } = process.env;
export const messages = [{ role: "user", content: "What is the capital of France?" }];

export async function check(name, body) {
  await body();
  console.log(`ok ${name}`);
}

export async function gathered(stream) {
  const pieces = [];
  for await (const piece of stream) pieces.push(piece);
  return pieces;
}
