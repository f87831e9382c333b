# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Thinking in vectors, on a CPU
#
# A small transformer gets a list `f(0) .. f(9)` and a start `s`, and has to answer `f(f(f(f(s))))`. It does not write
# the steps: it feeds its own last hidden state back four times (Coconut,
# [arXiv:2412.06769](https://arxiv.org/abs/2412.06769)) and then writes the answer.
#
# We train the model, measure it on problems that it has not seen, and then change its thoughts to see whether it uses
# them. The notebook is made for two CPU cores.

# %%
# On a fresh machine (Colab): clone, install, and work inside the clone. Does nothing where latentjax is importable.
import importlib.util
import os
import subprocess
import sys

CLONE_URL = "https://github.com/ORGANISATION/latentjax"  # the address that you cloned from, or would

if importlib.util.find_spec("latentjax") is None:
    subprocess.run(["git", "clone", "--depth", "1", CLONE_URL, "latentjax"], check=True)
    os.chdir("latentjax")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-e", ".[train]"], check=True)
    sys.path.insert(0, os.getcwd())

# %%
import dataclasses
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np

from configs.quickstart import STAGE_STEPS, arm
from eval.controls import donor_share, replace_thoughts, spelled_shares
from eval.evaluate import evaluate_split
from latentjax.tokenizers import Codec
from train.loop import train

# %% [markdown]
# ## The task
#
# The reference steps are what a chain of thought would write. In the first stage the model learns to write all four;
# each later stage replaces one more of them by a thought, until only the answer is written.

# %%
# Tests run this notebook with fewer steps; then the figures below mean nothing.
REDUCTION = int(os.environ.get("LATENTJAX_NOTEBOOK_REDUCTION", "1"))
PROBLEMS = 1000 // REDUCTION

experiment = arm("Coconut", seed=0, stage_steps=tuple(max(1, steps // REDUCTION) for steps in STAGE_STEPS))
task, method = experiment.task, experiment.method
example = task.examples("valid", count=1, seed=0)[0]
print("question:", example.question)
print("steps:   ", " ".join(example.steps))
print("answer:  ", example.answer)

# %% [markdown]
# ## Train

# %%
result = train(experiment, tempfile.mkdtemp(prefix="latentjax-") + "/coconut", progress=False)

# %%
records = [record for record in result.records if record["kind"] == "train"]
plt.figure(figsize=(6, 3))
plt.plot([record["step"] for record in records], [record["loss"] for record in records])
for step in np.cumsum(method.stage_steps)[:-1]:
    plt.axvline(step, color="0.8", zorder=0)
plt.xlabel("optimiser step (lines: one more step becomes a thought)")
plt.ylabel("loss")
plt.show()

# %% [markdown]
# ## Evaluate
#
# Test problems are kept apart by a hash of the problem, so none of them was trained on. The interval is Wilson's, 95%.

# %%
examples = task.examples("test", count=PROBLEMS, seed=0)


def evaluate(**options):
    batch, key = min(250, PROBLEMS), jax.random.key(0)
    params, tokenizer = result.params, result.tokenizer
    return evaluate_split(method, params, task, tokenizer, examples, batch_size=batch, key=key, **options)


def show(name, evaluation):
    print(f"{name:24s} {evaluation.accuracy:.3f}  [{evaluation.low:.3f}, {evaluation.high:.3f}]  of {evaluation.n}")


clean = evaluate(keep_vectors=True)
show("four thoughts", clean)

# %% [markdown]
# ## Intervene
#
# A model may carry thoughts along without using them. Three changes, each made where a thought enters the cache:
# fewer thoughts, thoughts set to zero, and the thoughts of another problem.

# %%
fewer = {k: evaluate(thoughts=k) for k in range(method.max_thoughts() + 1)}
zeroed = evaluate(intervention=replace_thoughts(np.zeros_like(clean.vectors)))
swapped = evaluate(intervention=replace_thoughts(np.roll(clean.vectors, 1, axis=0)))
same = evaluate(intervention=replace_thoughts(clean.vectors))

for k, evaluation in fewer.items():
    show(f"{k} thoughts", evaluation)
show("thoughts set to zero", zeroed)
show("thoughts of another", swapped)
show("own thoughts put back", same)
assert [p.text for p in same.predictions] == [p.text for p in clean.predictions]

# %% [markdown]
# Fewer thoughts need not mean a lower accuracy: the early stages taught the model to write the steps that no thought
# replaces, and it may still do so. Look at what it writes.

# %%
for k, evaluation in fewer.items():
    print(f"{k} thoughts: {evaluation.predictions[0].text}")
print("reference: ", " ".join(examples[0].steps))

# %% [markdown]
# With another problem's thoughts, whose answer does the model give? Problem i gets the thoughts of problem i - 1.

# %%
share = donor_share(task, examples, [examples[i - 1] for i in range(len(examples))], swapped)
print(f"answers of the donor: {share.value:.3f} of the {share.n} problems whose donor has another answer")

# %% [markdown]
# ## Change one thought
#
# A sharper question: replace only thought 2. If the later thoughts are computed from it, the answer must be the one of
# the *recipient's* list, followed from the *donor's* second step.

# %%
intervention = replace_thoughts(np.roll(clean.vectors, 1, axis=0))
only_second = np.zeros_like(intervention.where)
only_second[:, 1] = True
one_swapped = evaluate(intervention=dataclasses.replace(intervention, where=only_second))

predicted = [task.evaluate(examples[i], 1, int(examples[i - 1].steps[1])) for i in range(len(examples))]
follows = [p.parsed == answer for p, answer in zip(one_swapped.predictions, predicted, strict=True)]
print(f"answers that follow from the donor's second step: {np.mean(follows):.3f} of {len(follows)}")

# %% [markdown]
# ## Read the thoughts
#
# The output head turns a thought into a distribution over tokens, as it would turn any hidden state. How often is
# the most likely token the reference step?

# %%
codec = Codec(result.tokenizer, task.format)
shares = spelled_shares(method, result.params, codec, examples, clean.vectors)
low, high = np.transpose([share.interval for share in shares])
values = np.array([share.value for share in shares])
plt.figure(figsize=(5, 3))
plt.bar(range(1, len(shares) + 1), values, yerr=[values - low, high - values], capsize=4)
plt.xlabel("thought")
plt.ylabel("spells its reference step")
plt.ylim(0, 1.05)
plt.show()

# %% [markdown]
# If the bars are high, these thoughts are nearly the tokens that they replaced: a chain of thought in continuous form.
# This setting does not show a superposition of several chains; the graph tasks are made for that question.
#
# Next: `python -m train configs/quickstart.py --help` for all fields, `docs/methods_howto.md` for a method of your own.
