// Trains with onnxruntime-web 1.19.2, from artifacts that vitrim wrote.
//
//     node ort_web_training.js PACKAGE ARTIFACTS DATA
//
// DATA is JSON: a list of batches, each an object of { type, dims, data } by input. Prints the loss of each step as JSON, and
// the norm of all parameters before and after. The learning rate is the runtime's default, 0.001.
"use strict";
const fs = require("node:fs");
const path = require("node:path");

async function main(library, artifacts, dataFile) {
  const ort = require(path.join(library, "dist/ort.training.wasm.min.js"));
  ort.env.wasm.numThreads = 1;
  const file = (name) => new Uint8Array(fs.readFileSync(path.join(artifacts, name)));
  const session = await ort.TrainingSession.create({
    checkpointState: file("checkpoint"),
    trainModel: file("training_model.onnx"),
    evalModel: file("eval_model.onnx"),
    optimizerModel: file("optimizer_model.onnx"),
  });
  const norm = async () => {
    const { data } = await session.getContiguousParameters(true);
    return Math.sqrt(data.reduce((sum, x) => sum + x * x, 0));
  };
  const convert = { float32: (data) => Float32Array.from(data), int64: (data) => BigInt64Array.from(data, BigInt) };
  const before = await norm();
  const losses = [];
  for (const batch of JSON.parse(fs.readFileSync(dataFile, "utf8"))) {
    const entry = ([name, { type, dims, data }]) => [name, new ort.Tensor(type, convert[type](data), dims)];
    const results = await session.runTrainStep(Object.fromEntries(Object.entries(batch).map(entry)));
    losses.push(results[session.trainingOutputNames[0]].data[0]);
    await session.runOptimizerStep();
    await session.lazyResetGrad();
  }
  console.log(JSON.stringify({ losses, before, after: await norm() }));
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error);
  process.exit(1);
});
