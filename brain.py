"""BRAIn: Bayesian reward-conditioned amortized inference, in one file (arXiv 2402.02479).

Condition the supervised model p(y|x) on "this answer is good" (G = 1). Bayes' rule and a
Bradley-Terry reward model r give the posterior p(y|x, G=1) ∝ p(y|x)·exp(r(x, y)/kl_coef), the
optimum of E_q[r] − kl_coef·KL(q‖p). It can be weighed but not sampled, so distil it: draw n answers
to a prompt from a proposal q′ (the policy of a moment ago), weigh them by self-normalised importance
sampling (SNIS) and step the policy q_θ on KL(α̂ ‖ β̂), where

    α̂ = softmax(log p + r/kl_coef − log q′)   is the posterior's share of each of the n answers,
    β̂ = softmax(log q_θ − log q′)             the policy's share, a self-normalised baseline, and
    −Σᵢ (α̂ᵢ − β̂ᵢ) ∇ log q_θ(yᵢ)               the gradient: exactly 0 once the policy is right.

Legend: B prompts, n responses to each, P prompt and R response tokens, V vocabulary.
    log_prior   p, the supervised (SFT) model     log_proposal  q′, which sampled the responses
    log_policy  q_θ, the model being trained      reward        r(x, y), from the reward model
    A log-probability is of a whole response, in nats, summed over its tokens with end-of-text.

Stages (a checkpoint that is given skips its stage):
    1 sft     fine-tune --base on the references               out/prior,  or --prior
    2 reward  train a reward model on the comparisons          out/reward, or --reward
    3 brain   3.1 sample  3.2 score  3.3 weigh  3.4 step       out/policy
    4 eval    fresh samples on held-out prompts                out/report.md

Departures from the paper: (1) its hyper-parameters could not be reached, the defaults are our own;
(2) log q′ is the policy's score of the samples, not the sampler's own, so rounding cancels in β̂;
(3) a response that never ends pays missing_eos_penalty wherever a reward is used.

    python brain.py                     the toy task, two CPU cores, no network
    python brain.py --task tldr         TL;DR with Pythia 1B on one CUDA GPU in bf16
    python brain.py --task jsonl --prior DIR --reward DIR --data_dir DIR
    python brain.py --check             the derivation checks
"""

import contextlib
import copy
import functools
import gzip
import itertools
import json
import math
import operator
import os
import random
import shutil
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal, NamedTuple

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import get_hf_file_metadata
from huggingface_hub.errors import HTTPError
from huggingface_hub.file_download import http_get
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def flag(default, help: str):
    """A field of Config with the sentence that --help prints."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Config:
    """A run. Every field is a flag (dashes work too); default < preset of the task < flag."""

    task: Literal["toy", "tldr", "hh", "jsonl"] = flag("toy", "what to learn, from which files")
    base: str | None = flag(None, "hub name or folder of a model to fine-tune into the prior")
    prior: str | None = flag(None, "hub name or folder of a supervised model: skips stage 1")
    reward: str | None = flag(None, "hub name or folder of a reward model: skips stage 2")
    data_dir: str | None = flag(None, "where the data files lie, and where downloads go")
    hh_subsets: list[str] = field(default_factory=lambda: ["harmless-base", "helpful-base"],
                                  metadata={"help": "folders of the HH data set"})
    out: str | None = flag(None, "the run's folder; out/TASK by default")
    overwrite: bool = flag(False, "delete the run in --out and start afresh")
    check: bool = flag(False, "print the derivation checks, nothing else")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "auto: cuda where there is one")
    seed: int = flag(0, "reaches every draw")
    max_prompt_tokens: int = flag(512, "longer prompts are cut (tldr) or skipped")
    max_response_tokens: int = flag(128, "limit of sampling and of sft, end-of-text included")
    max_comparison_tokens: int = flag(256, "limit of the responses that train a reward model")
    temperature: float = flag(1.0, "after sft, every model is softmax(logits / temperature)")
    missing_eos_penalty: float = flag(1.0, "reward units, off a response without end-of-text")
    sft_lr: float = flag(1e-5, "first learning rate of stage 1; each decays linearly to 0")
    sft_batch: int = flag(64, "references a step")
    sft_epochs: int = flag(1, "passes over the references")
    reward_lr: float = flag(3e-6, "first learning rate of stage 2")
    reward_batch: int = flag(64, "pairs a step")
    reward_epochs: int = flag(1, "passes over the comparisons")
    lr: float = flag(1e-6, "first learning rate of stage 3")
    steps: int = flag(1000, "optimizer steps of stage 3")
    samples_per_prompt: int = flag(8, "n, at least 2")
    prompts_per_step: int = flag(32, "prompts a step of stage 3")
    prompts_per_refresh: int = flag(128, "prompts sampled at a time: a multiple of the above")
    kl_coef: float = flag(0.5, "reward units a nat of KL to the prior costs; small is greedy")
    target: Literal["posterior", "argmax"] = flag("posterior", "alpha: posterior, or best sample")
    baseline: Literal["none", "unnormalized", "self_normalized"] = flag(
        "self_normalized", "of DPG, of GDC++, of BRAIn")
    divergence: Literal["forward", "reverse"] = flag("forward", "KL(alpha||beta) or KL(beta||alpha)")
    proposal: Literal["lagged", "prior"] = flag("lagged", "who samples: the last refresh's policy, p")
    max_grad_norm: float = flag(1.0, "larger gradients are scaled down to this norm")
    micro_batch_tokens: int = flag(16384, "tokens a forward pass; lower it if memory runs out")
    save_every: int = flag(0, "steps between saved states; 0: ten minutes")
    eval_prompts: int = flag(256, "held-out prompts of the evaluation")
    eval_samples: int = flag(4, "responses to each of them, at least 2")


# Presets hold differences only. tldr and hh are meant for 1B checkpoints on one H100 or H200; the
# learning rates, batches, lengths and temperature of tldr worked for PPO on it elsewhere (README).
PRESETS = {
    "toy": dict(max_prompt_tokens=16, max_response_tokens=4, max_comparison_tokens=4, kl_coef=0.15,
                sft_lr=3e-3, sft_epochs=4, reward_lr=1e-3, reward_epochs=4, lr=1e-3, steps=400,
                prompts_per_step=16, prompts_per_refresh=64, save_every=50),
    "tldr": dict(prior="cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr",
                 reward="cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr", data_dir="data/tldr",
                 max_response_tokens=53, max_comparison_tokens=169, temperature=0.7,
                 sft_lr=3e-6, sft_batch=128),
    "hh": dict(prior="lomahony/eleuther-pythia1b-hh-sft", data_dir="data/hh-rlhf"),
    "jsonl": dict(),
}


# ------------------------------------------------------------------------------------------------
# The paper: pure functions of log-probabilities and rewards. Who stops reading here has read the
# method. Shapes are (B, n): B prompts, n responses to each. Every function keeps its input's dtype.
# ------------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """Shares of the n samples of a prompt; each row sums to 1."""

    alpha_hat: Tensor  # (B, n) the posterior's
    beta_hat: Tensor  # (B, n) the policy's


def log_alpha_hat(log_prior, log_proposal, reward, kl_coef: float, target: str) -> Tensor:
    """log α̂ (B, n): the log-share of each sample under the posterior (or under its argmax limit)."""
    if not kl_coef > 0:
        raise ValueError(f"kl_coef must be positive, not {kl_coef}")
    if target == "posterior":  # p(y|x, G=1) ∝ p(y|x)·exp(r/kl_coef), over q′; Z(x) cancels
        return (log_prior + reward / kl_coef - log_proposal).log_softmax(-1)
    if target == "argmax":  # kl_coef → 0: all weight on the highest reward, shared among ties
        best = (reward == reward.amax(-1, keepdim=True)).to(reward.dtype)
        return (best / best.sum(-1, keepdim=True)).log()
    raise ValueError(f"target must be posterior or argmax, not {target!r}")


def snis_weights(log_policy: Tensor, log_prior: Tensor, log_proposal: Tensor, reward: Tensor,
                 kl_coef: float, target: str = "posterior") -> Weights:
    """Self-normalised importance weights α̂ of the posterior and β̂ of the policy (paper, section 4).

    Takes four (B, n) tensors: log-probabilities of whole responses in nats, rewards in the reward
    model's units. Raises ValueError for unequal shapes, kl_coef <= 0 or an unknown target.
    """
    if not log_policy.shape == log_prior.shape == log_proposal.shape == reward.shape:
        raise ValueError("log_policy, log_prior, log_proposal and reward need one shape, (B, n)")
    alpha_hat = log_alpha_hat(log_prior, log_proposal, reward, kl_coef, target).exp()
    return Weights(alpha_hat, (log_policy - log_proposal).softmax(-1))


def brain_loss(log_policy: Tensor, log_prior: Tensor, log_proposal: Tensor, reward: Tensor,
               kl_coef: float, *, target: str = "posterior", baseline: str = "self_normalized",
               divergence: str = "forward") -> tuple[Tensor, Weights]:
    """BRAIn's loss KL(α̂ ‖ β̂) per prompt (B,) in nats, and the (detached) weights behind it.

    Differentiable in log_policy alone; its gradient is −Σᵢ (α̂ᵢ − β̂ᵢ) ∇log q_θ(yᵢ) (paper, Theorem
    4.1). The three baselines are three estimates A of log Σ_y q_θ(y|x), whose true value is 0; they
    subtract 0, exp(ρᵢ)/n and β̂ᵢ. divergence="reverse" is KL(β̂ ‖ α̂), the policy-gradient side.
    Inputs and errors as in snis_weights; reverse with any other dial turned is a ValueError too.
    """
    log_prior, log_proposal, reward = log_prior.detach(), log_proposal.detach(), reward.detach()
    weights = snis_weights(log_policy, log_prior, log_proposal, reward, kl_coef, target)
    detached = Weights(*(weight.detach() for weight in weights))
    alpha, n = weights.alpha_hat, reward.shape[-1]
    rho = log_policy - log_proposal  # (B, n) log-ratios ρ = log q_θ − log q′
    if divergence == "reverse":
        if (target, baseline) != ("posterior", "self_normalized"):
            raise ValueError("reverse needs target posterior and the self_normalized baseline")
        log_alpha = log_alpha_hat(log_prior, log_proposal, reward, kl_coef, target)
        return (weights.beta_hat * (rho.log_softmax(-1) - log_alpha)).sum(-1), detached
    if divergence != "forward":
        raise ValueError(f"divergence must be forward or reverse, not {divergence!r}")
    if baseline == "self_normalized":  # A = log mean exp(ρ): BRAIn
        normaliser = rho.logsumexp(-1) - math.log(n)
    elif baseline == "unnormalized":  # A = mean exp(ρ) − 1: GDC++'s baseline
        normaliser = rho.exp().mean(-1) - 1
    elif baseline == "none":  # A = 0: DPG
        normaliser = torch.zeros_like(rho[..., 0])
    else:
        raise ValueError(f"baseline must be none, unnormalized or self_normalized, not {baseline!r}")
    # Σ α̂ᵢ (log(n α̂ᵢ) − ρᵢ) + A(ρ), with 0·log 0 = 0
    return (torch.xlogy(alpha, n * alpha) - alpha * rho).sum(-1) + normaliser, detached


def bradley_terry_loss(reward_chosen: Tensor, reward_rejected: Tensor) -> Tensor:
    """−log P(chosen ≻ rejected) = −log σ(Δr) per pair (B,): P(y₁ ≻ y₂) = g₁/(g₁+g₂), g = exp(r)."""
    return -F.logsigmoid(reward_chosen - reward_rejected)


def effective_sample_size(weights: Tensor) -> Tensor:
    """Kish's 1/Σwᵢ² per prompt (B,), for weights (B, n) that sum to 1: between 1 and n."""
    return 1 / weights.square().sum(-1)


# ------------------------------------------------------------------------------------------------
# Command line and data: four tasks, one Example
# ------------------------------------------------------------------------------------------------
TLDR_URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
HH_URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main"
POST, TLDR, TURN = "\n\nPOST: ", "\n\nTL;DR:", "\n\nAssistant:"
KEYS, FILLERS = "sun moon star rain wind".split(), "the a of in and".split()


class BadInput(ValueError):
    """A user's mistake, in one line: exit status 2."""


class Halt(RuntimeError):
    """A guard stopped the run, whose last good state is kept: exit status 1."""


ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError,
          EOFError, zlib.error, HTTPError, SafetensorError, UnpicklingError)


@contextlib.contextmanager
def telling(what, kind=BadInput):
    """Tells the errors that files, checkpoints and disks cause in one line, which begins with `what`."""
    try:
        yield
    except (BadInput, Halt):
        raise
    except ERRORS as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise kind(f"{what}: {reason}") from error


def progress(*args, **options) -> tqdm:
    """A progress bar, where somebody is watching."""
    return tqdm(*args, disable=not sys.stdout.isatty(), **options)


def refuse(message: str):
    """Stands in for argparse's usage text and SystemExit."""
    raise BadInput(message)


def parse_config(argv: list[str] | None = None) -> Config:
    """The resolved configuration, or BadInput before anything is loaded."""
    parser = transformers.HfArgumentParser(Config, allow_abbrev=False, prog="brain.py")
    parser.error = refuse
    given = parser.parse_args(argv)  # without a preset: what the user said himself
    preset = dict(PRESETS[given.task], out=f"out/{given.task}")
    if given.base:  # another base is another family: the preset's checkpoints would not fit it
        preset |= dict(prior=None, reward=None)
    parser.set_defaults(**preset)
    cfg = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0]
    for name, value in asdict(cfg).items():
        least = 2 if name in ("samples_per_prompt", "eval_samples", "eval_prompts") else 1
        zero = name in ("seed", "save_every", "missing_eos_penalty")
        if type(value) is int and value < (0 if zero else least):
            raise BadInput(f"--{name} must be at least {0 if zero else least}, not {value}")
        if type(value) is float and not (0 < value < math.inf or zero and value == 0):
            raise BadInput(f"--{name} must be positive and finite, not {value}")
    if cfg.base and cfg.prior:
        raise BadInput("--base is fine-tuned into the prior: --prior cannot be given as well")
    if cfg.prompts_per_refresh % cfg.prompts_per_step:
        raise BadInput("--prompts_per_refresh must be a multiple of --prompts_per_step")
    if cfg.divergence == "reverse" and (cfg.target, cfg.baseline) != (Config.target, Config.baseline):
        raise BadInput("--divergence reverse needs target posterior and baseline self_normalized")
    if cfg.task != "toy" and not (cfg.base or cfg.prior):
        raise BadInput(f"--task {cfg.task} needs --base or --prior, a hub name or a folder")
    if cfg.task == "jsonl" and not cfg.data_dir:
        raise BadInput("--task jsonl needs --data_dir, a folder of train.jsonl and test.jsonl")
    return cfg


class Example(NamedTuple):
    """A prompt and what the task knows of it; None where it knows nothing."""

    prompt: str
    reference: str | None = None
    chosen: str | None = None
    rejected: str | None = None


def fetch(path: Path, url: str) -> Path:
    """`path`, downloaded if absent: under a temporary name, resumed, its length checked."""
    if path.exists():
        return path
    with telling(f"{path} is absent (--data_dir names its folder) and {url} cannot be fetched"):
        size = get_hf_file_metadata(url).size
        print(f"fetching {url}, {(size or 0) / 1e6:.1f} MB, to {path}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with open(part, "ab") as file:
            http_get(url, file, resume_size=file.tell(), expected_size=size)
        return part.rename(path)


def read_rows(path: Path) -> Iterator[tuple[dict, str]]:
    """(row, "file:line") for each line of a .jsonl or .jsonl.gz file; BadInput where it is broken."""
    with telling(path), (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            with telling(f"{path}:{number}"):
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("a row must be a JSON object")
            yield row, f"{path}:{number}"


def text_at(row: dict, where: str, *keys: str | int) -> str:
    """The text at row[key][key]…, or BadInput that names the place."""
    with telling(f"{where}: no text at {'.'.join(map(str, keys))}"):
        return functools.reduce(operator.getitem, keys, row).encode().decode()  # no surrogates


def parse_jsonl(row: dict, where: str) -> Example:
    """A user's row: `prompt`, and optionally `reference`, and `chosen` with `rejected`."""
    given = {key: text_at(row, where, key) for key in Example._fields if row.get(key) is not None}
    if not given.get("prompt", "").strip():
        raise BadInput(f"{where}: no prompt")
    if ("chosen" in given) != ("rejected" in given):
        raise BadInput(f"{where}: chosen and rejected need each other")
    return Example(**given)


def parse_dialogue(row: dict, where: str) -> Example | None:
    """An HH row: two dialogues that part after the last "Assistant:"; None where they do not."""
    chosen, rejected = (text_at(row, where, side).rpartition(TURN) for side in ("chosen", "rejected"))
    if chosen[:2] != rejected[:2] or not chosen[1] or not (chosen[2].strip() and rejected[2].strip()):
        return None
    return Example(chosen[0] + TURN, reference=chosen[2], chosen=chosen[2], rejected=rejected[2])


def parse_post(row: dict, where: str) -> Example | None:
    """A row of tldr_3_filtered, or of the comparisons; None for news and for empty summaries."""
    info = row.get("info", row)
    if isinstance(info, dict) and "article" in info:
        return None
    subreddit, title, post = (text_at(info, where, key) for key in ("subreddit", "title", "post"))
    prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}{POST}{post}{TLDR}"
    if info is row:
        summaries = [text_at(row, where, "summary")]
    elif (choice := row.get("choice")) in (0, 1) and type(choice) is int:
        order = (choice, 1 - choice)  # the preferred one first
        summaries = [None, *(text_at(row, where, "summaries", i, "text") for i in order)]
    else:
        raise BadInput(f"{where}: choice must be 0 or 1, not {choice!r}")
    texts = [s and " " + s.strip() for s in summaries]  # one leading space, as the models expect
    return None if " " in texts else Example(prompt, *texts)


def shorten(prompt: str) -> str | None:
    """A TL;DR prompt less its post's last line, or less a character if there is but one."""
    head, marker, post = prompt.removesuffix(TLDR).partition(POST)
    return head + marker + post[: post.rfind("\n")] + TLDR if post else None


def toy_rows(rng: random.Random, rows: int) -> Iterator[Example]:
    """Made-up posts: a good summary lists the key words, once each, and nothing else."""
    for _ in range(rows):
        keys = rng.sample(KEYS, rng.randint(1, 3))
        words = rng.sample(keys + rng.choices(FILLERS, k=6 - len(keys)), 6)
        drafts = [rng.sample(keys, len(keys)) for _ in range(3)]
        for draft in drafts:  # people are sloppy: none, one or two slips
            for _ in range(rng.choice([0, 1, 2])):
                at = rng.randrange(len(draft))  # a word too many, a wrong one, or one for two
                draft[at : at + rng.choice([0, 1, 2])] = [rng.choice(KEYS + FILLERS)]
        worth = [2 * len(set(draft) & set(keys)) - len(draft) for draft in drafts]
        if rng.random() < 1 / (1 + math.exp(2 * (worth[1] - worth[2]))):  # judges are noisy
            drafts[1], drafts[2] = drafts[2], drafts[1]  # the better one first, mostly
        yield Example(" ".join([*words, TLDR.strip()]), *map(" ".join, drafts))


def task_rows(cfg: Config, split: str) -> Iterator[Example | None]:
    """Every row of a split; None for those that the data set itself has broken."""
    folder = Path(cfg.data_dir or "")
    if cfg.task == "toy":
        yield from toy_rows(random.Random(f"{cfg.seed} {split}"), dict(train=2048, test=512)[split])
    elif cfg.task == "jsonl":
        yield from itertools.starmap(parse_jsonl, read_rows(folder / f"{split}.jsonl"))
    elif cfg.task == "hh":
        for name in (f"{subset}/{split}.jsonl.gz" for subset in cfg.hh_subsets):
            yield from itertools.starmap(parse_dialogue, read_rows(fetch(folder / name, f"{HH_URL}/{name}")))
    else:
        names = [f"datasets/tldr_3_filtered/{split}.jsonl"]
        if cfg.reward is None:  # the comparisons, of which there is no batch 21, train one
            names += [f"dataset/comparisons/batch{i}.json" for i in range(3, 23) if i != 21]
        for name in names:
            for row, where in read_rows(fetch(folder / name, f"{TLDR_URL}/{name}")):
                if "info" not in row or (row.get("split") == "train") == (split == "train"):
                    yield parse_post(row, where)


def load_task(cfg: Config, split: str, tokenizer) -> list[Example]:
    """The examples of a split ("train" or "test"), their prompts within max_prompt_tokens.

    TL;DR posts are cut to fit; other long prompts are skipped, as are rows that the data set itself
    has broken, and both are counted. Anything else that is wrong with the files is BadInput.
    """
    examples, skipped, rows = [], Counter(), task_rows(cfg, split)
    with progress(desc=f"reading {split}", unit=" rows") as bar:
        while chunk := list(itertools.islice(rows, 1000)):  # in batches, which use every core
            whole = [example for example in chunk if example]
            skipped["broken"] += len(chunk) - len(whole)
            for example, ids in zip(whole, encode(tokenizer, [e.prompt for e in whole]), strict=True):
                prompt = example.prompt
                while prompt and len(ids) > cfg.max_prompt_tokens:
                    prompt = shorten(prompt) if cfg.task == "tldr" else None
                    ids = encode(tokenizer, [prompt])[0] if prompt else ids
                skipped["too long"] += not prompt
                examples += [example._replace(prompt=prompt)] if prompt else []
            bar.update(len(chunk))
    note = ", ".join(f"{number} {why}" for why, number in skipped.items())
    print(f"{cfg.task} {split}: {len(examples)} examples, skipped: {note or 'no rows at all'}", flush=True)
    if not examples:
        raise BadInput(f"--task {cfg.task} has no usable {split} rows ({note or 'the file is empty'})")
    return examples


def encode(tokenizer, texts: list[str], limit: int | None = None) -> list[list[int]]:
    """Ids of prompts, with the tokenizer's own special tokens; or, given a limit, of responses:
    nothing added but a final eos, all cut to the limit, so that a cut response has no eos."""
    if not texts:
        return []
    ids = tokenizer(texts, add_special_tokens=limit is None, verbose=False).input_ids
    return ids if limit is None else [(y + [tokenizer.eos_token_id])[:limit] for y in ids]


# ------------------------------------------------------------------------------------------------
# Models, and one layout for all of them: one prompt, n branches
#
# The n responses to a prompt share it. Its keys and values are computed once, into a cache; then
# the branches are fed, g of them to a row, token by token: column c of a row is token c // g of
# branch c % g. A branch begins with the prompt's last token x₃, whose output predicts y₁. Here are
# g = 2 branches a and b, left padding ·, and the mask, in which # is "sees":
#
#                        cache       row of branches
#                        ·  x₁ x₂    x₃ᵃ x₃ᵇ y₁ᵃ y₁ᵇ y₂ᵃ y₂ᵇ
#          predicts y₁ᵃ     #  #     #
#          predicts y₁ᵇ     #  #         #
#          predicts y₂ᵃ     #  #     #       #
#          predicts y₂ᵇ     #  #         #       #
#
# Sampling feeds one token of all branches at a time into that cache (g = n); scoring feeds all
# columns at once with g = gcd(n, 4), which was fastest and leanest (README, "The cost of a step").
# A step costs P + nR tokens; a row per sample would cost n(P + R).
# ------------------------------------------------------------------------------------------------
MASKED = torch.finfo(torch.bfloat16).min  # finite in bf16 and fp32: rows of padding make no NaN


class Batch(NamedTuple):
    """Padded ids of B prompts with n responses each. A mask says what is real: pad may equal eos."""

    prompt: Tensor  # (B, P) left-padded, without its last token
    real: Tensor  # (B, P) False on padding
    branch: Tensor  # (B, n, 1 + R) the prompt's last token, then the response, right-padded
    length: Tensor  # (B, n) tokens of each response


def pack(prompts: list[list[int]], responses: list[list[list[int]]], device="cpu") -> Batch:
    """Ids of B prompts, a token or more each, and of n responses to each (with eos, if they end).

    Raises ValueError for an empty prompt or a ragged n.
    """
    if not all(prompts) or len({len(ys) for ys in responses}) != 1:
        raise ValueError("pack needs prompts of a token or more, and n responses to each")
    P = max(2, *map(len, prompts)) - 1
    R = max(len(y) for ys in responses for y in ys)
    prompt = [[0] * (P + 1 - len(x)) + x[:-1] for x in prompts]
    real = [[False] * (P + 1 - len(x)) + [True] * (len(x) - 1) for x in prompts]
    branch = [[x[-1:] + y + [0] * (R - len(y)) for y in ys]
              for x, ys in zip(prompts, responses, strict=True)]
    length = [[len(y) for y in ys] for ys in responses]
    return Batch(*(torch.tensor(rows, device=device) for rows in (prompt, real, branch, length)))


def unpack(batch: Batch) -> tuple[list[list[int]], list[list[list[int]]]]:
    """The ids that pack was given."""
    last = batch.branch[:, 0, :1].tolist()
    prompts = [x[m].tolist() + y for x, m, y in zip(batch.prompt, batch.real, last, strict=True)]
    rows = zip(batch.branch[..., 1:].tolist(), batch.length.tolist(), strict=True)
    return prompts, [[y[:k] for y, k in zip(ys, ks, strict=True)] for ys, ks in rows]


def fold(x: Tensor, g: int) -> Tensor:
    """(B, n, T) branches to (B·n/g, T·g) rows."""
    return x.reshape(-1, g, x.shape[-1]).transpose(1, 2).flatten(1)


def unfold(x: Tensor, n: int, g: int) -> Tensor:
    """(B·n/g, T·g, …) rows to (B, n, T, …) branches."""
    return x.unflatten(1, (-1, g)).transpose(1, 2).reshape(-1, n, x.shape[1] // g, *x.shape[2:])


def prefill(model, batch: Batch) -> transformers.DynamicCache:
    """The prompts' keys and values, (B, P) columns, with gradients; nothing passes the head."""
    cache = transformers.DynamicCache()
    position = (batch.real.cumsum(-1) - 1).clamp(min=0)  # (B, P)
    model.base_model(batch.prompt, attention_mask=batch.real.long(), position_ids=position,
                     past_key_values=cache, use_cache=True)
    return cache


def feed(module, cache, batch: Batch, ids: Tensor, g: int, first: int = 0):
    """`module`'s output for rows `ids` (B·n/g, T·g), which are the branches' tokens from `first`."""
    B, P = batch.real.shape
    repeat, step = len(ids) // B, torch.arange(first + ids.shape[1] // g, device=ids.device)
    own = torch.kron(step <= step[first:, None], torch.eye(g, device=ids.device).bool())
    see = torch.cat([batch.real[:, None].expand(B, len(own), P), own.expand(B, -1, -1)], -1)
    # added to the attention scores: a boolean mask would be silently wrong under eager attention
    mask = torch.zeros(see.shape, dtype=module.dtype, device=ids.device).masked_fill(~see, MASKED)
    position = batch.real.sum(-1, keepdim=True) + step[first:].repeat_interleave(g)  # (B, T·g)
    return module(ids, attention_mask=mask[:, None].repeat_interleave(repeat, 0), use_cache=True,
                  position_ids=position.repeat_interleave(repeat, 0), past_key_values=cache)


def feed_branches(model, module, batch: Batch, T: int):
    """`module`'s output for the first T tokens of all branches at once, and their n and g."""
    n = batch.branch.shape[1]
    g = math.gcd(n, 4)
    cache = prefill(model, batch)
    cache.batch_repeat_interleave(n // g)
    return feed(module, cache, batch, fold(batch.branch[..., :T], g), g), n, g


def sequence_log_prob(model, batch: Batch, temperature: float = 1.0) -> Tensor:
    """log q(y|x) of each response, (B, n), in nats, fp32, differentiable."""
    R = batch.branch.shape[2] - 1
    output, n, g = feed_branches(model, model, batch, R)
    logits = output.logits.float() / temperature  # (B·n/g, R·g, V)
    target = fold(batch.branch[..., 1:], g)  # (B·n/g, R·g)
    token = -F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    token = unfold(token.view_as(target), n, g)  # (B, n, R)
    return token.where(torch.arange(R, device=token.device) < batch.length[..., None], 0).sum(-1)


def score_reward(reward_model, batch: Batch, tokenizer=None, reward_tokenizer=None) -> Tensor:
    """The raw reward of each response, (B, n), fp32, read at its last token; differentiable.

    A reward model with a tokenizer of its own (then pass the policy's, too) scores decoded text: a
    decoder with its own eos at the end, any other sequence classifier as a pair of texts.
    """
    if reward_tokenizer:
        prompts, responses = unpack(batch)
        n = len(responses[0])
        x = tokenizer.batch_decode(prompts, skip_special_tokens=True)
        y = tokenizer.batch_decode(sum(responses, []), skip_special_tokens=True)
        if not hasattr(reward_model, "score"):
            x, width = [text for text in x for _ in range(n)], reward_model.config.max_position_embeddings
            rows = reward_tokenizer(
                x, y, padding=True, truncation="only_first", return_tensors="pt",
                max_length=min(width, reward_tokenizer.model_max_length)).to(batch.prompt.device)
            return reward_model(**rows).logits.float().view(-1, n)
        y = encode(reward_tokenizer, y, limit=sys.maxsize)
        responses = [y[i : i + n] for i in range(0, len(y), n)]
        batch = pack(encode(reward_tokenizer, x), responses, batch.prompt.device)
    output, n, g = feed_branches(reward_model, reward_model.base_model, batch, batch.branch.shape[2])
    score = reward_model.score(output.last_hidden_state).squeeze(-1)  # (B·n/g, (1 + R)·g)
    return unfold(score, n, g).float().gather(-1, batch.length[..., None]).squeeze(-1)


@torch.no_grad()
def sample(model, prompts: list[list[int]], n: int, max_new_tokens: int, *, eos_id: int,
           temperature: float = 1.0, generator=None) -> tuple[list[list[list[int]]], Tensor]:
    """n responses to each prompt from softmax(logits / temperature), nothing truncated.

    Returns their ids (B, n), eos included unless cut at max_new_tokens, and log q′ (B, n) in fp32.
    `generator` is one, or a list with one per prompt, which makes a prompt's samples independent
    of its neighbours. A token inverts the cumulative distribution at a uniform number.
    """
    batch = pack(prompts, [[[]] * n for _ in prompts], model.device)
    generators = generator if isinstance(generator, list) else [generator] * len(prompts)
    uniform = torch.stack([torch.rand(n, max_new_tokens, generator=g, dtype=torch.float64)
                           for g in generators]).to(model.device)  # (B, n, R)
    cache, ids = prefill(model, batch), batch.branch[..., 0]  # (B, n)
    log_q = torch.zeros(ids.shape, device=model.device)
    ended, tokens = torch.zeros_like(ids, dtype=torch.bool), []
    for step in range(max_new_tokens):
        logits = feed(model, cache, batch, ids, n, first=step).logits  # (B, n, V)
        log_p = (logits.float() / temperature).log_softmax(-1)
        cdf = log_p.double().exp().cumsum(-1)
        ids = torch.searchsorted(cdf, uniform[..., step, None] * cdf[..., -1:], right=True)
        ids = ids.squeeze(-1).clamp(max=cdf.shape[-1] - 1)  # (B, n)
        log_q += log_p.gather(-1, ids[..., None]).squeeze(-1).where(~ended, 0)
        tokens.append(ids.where(~ended, -1))  # −1 after the end
        ended |= ids == eos_id
        if ended.all():
            break
    rows = torch.stack(tokens, -1).tolist()
    return [[[token for token in y if token >= 0] for y in ys] for ys in rows], log_q


def fp32_linear(head, hidden: Tensor) -> Tensor:
    """A head's forward, in fp32 under autocast too: bf16 logits cost 0.2 nats over 53 tokens."""
    with torch.autocast(hidden.device.type, enabled=False):
        bias = None if head.bias is None else head.bias.float()
        return F.linear(hidden.float(), head.weight.float(), bias)


def load_tokenizer(name: str):
    """The tokenizer of a checkpoint; BadInput without words or without an end-of-text token."""
    with telling(f"no tokenizer could be loaded from {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # the library's answer to no files at all
        raise BadInput(f"{name} has no tokenizer beside its weights")
    if tokenizer.eos_token_id is None:
        raise BadInput(f"the tokenizer of {name} has no end-of-text token (eos)")
    tokenizer.truncation_side = "left"
    return tokenizer


def load_model(kind, name: str, new_head: bool = False):
    """A frozen fp32 checkpoint, dropout off; BadInput where weights are missing or do not fit."""
    options = dict(num_labels=1) if new_head else {}
    with telling(f"{name} could not be loaded"):
        model, info = kind.from_pretrained(name, dtype=torch.float32, trust_remote_code=False,
                                           output_loading_info=True, **options)
    if info["missing_keys"] and not new_head:
        raise BadInput(f"{name} has no {min(info['missing_keys'])}: it was not trained for this use")
    if kind is AutoModelForSequenceClassification and model.config.num_labels != 1:
        raise BadInput(f"{name} has {model.config.num_labels} labels; a reward model has one")
    head = getattr(model, "score", None) or model.get_output_embeddings()
    if head is not None:
        head.forward = functools.partial(fp32_linear, head)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def check_branches(model, cfg: Config) -> None:
    """BadInput unless branches score as plain rows do in this architecture, at the full length."""
    ids = torch.randint(model.config.vocab_size, (2, cfg.max_prompt_tokens + cfg.max_response_tokens),
                        generator=make_generator(0)).to(model.device)
    x, y = ids[0, : cfg.max_prompt_tokens].tolist(), ids[:, cfg.max_prompt_tokens :]
    ids[1, : len(x)] = ids[0, : len(x)]
    with telling(f"the branch layout cannot be used with {model.config.model_type} models"):
        batch = pack([x], [y.tolist()], model.device)
        if hasattr(model, "score"):
            packed = score_reward(model, batch)[0]
            plain = model.score(model.base_model(ids).last_hidden_state)[:, -1, 0]
        else:
            packed = sequence_log_prob(model, batch)[0]
            log_p = model(ids).logits[:, len(x) - 1 : -1].log_softmax(-1)
            plain = log_p.gather(-1, y[..., None]).sum((1, 2))
        gap = (packed - plain).abs().max().item()
        if not gap < 1e-3:  # measured: 1e-4 nats or less; NaN fails too
            raise ValueError(f"packed and plain scores differ by {gap:.3g} nats")


# ------------------------------------------------------------------------------------------------
# A run: its folder, its one state file, its guards
# ------------------------------------------------------------------------------------------------
STAGES = ("sft", "reward", "brain", "done")
FREE = ("data_dir", "save_every", "micro_batch_tokens", "out", "overwrite")  # change no number
RUN_FILES = ("config.json", "metrics.jsonl", "report.md", "state.pt", "prior", "reward", "policy")


class Micro(NamedTuple):
    """Some of a step's prompts with their branches, and what is known of these, each (b, n)."""

    index: list[int]  # places of the prompts in the step
    batch: Batch
    scores: dict[str, Tensor]


class Run:
    """What the stages share: configuration, device, tokenizers, and a folder with one state file.

    Draws are keyed by (seed, stage, step), so stage, step, weights, optimizer and the refresh's
    samples are all that a killed run needs to continue bit for bit.
    """

    def __init__(self, cfg: Config):
        cuda = torch.cuda.is_available() and cfg.device != "cpu"
        if not cuda and (cfg.device == "cuda" or cfg.task == "tldr" and cfg.device == "auto"):
            raise BadInput(f"--task {cfg.task} --device {cfg.device} needs a CUDA GPU, and torch finds "
                           "none; --device cpu does without one, slowly")
        self.device = torch.device("cuda" if cuda else "cpu")
        self.dtype = torch.bfloat16 if cuda else torch.float32  # of frozen models and of autocast
        self.cfg, self.out = replace(cfg, device=self.device.type), Path(cfg.out)
        self.tokenizer = self.reward_tokenizer = None
        if cfg.overwrite:
            for path in (self.out / name for name in RUN_FILES):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.state = self.read_state()
        self.where, verb = torch.cuda.get_device_name() if cuda else "cpu", "starting"
        if "metrics" in self.state:
            verb = f"continuing at stage {self.state['stage']}, step {self.state['step']}, in"
        print(f"{self.where}: {verb} {self.out}", flush=True)

    def read_state(self) -> dict:
        """The saved state, its configuration compared; or that of a run not yet begun."""
        with telling(f"{self.out} holds a run that cannot be read; --overwrite starts afresh"):
            if (self.out / "config.json").exists():
                saved, now = json.loads((self.out / "config.json").read_text()), asdict(self.cfg)
                changed = [f"{k} was {saved.get(k)!r}, now {now[k]!r}" for k in now
                           if k not in FREE and saved.get(k) != now[k]]
                if changed:
                    raise BadInput(f"{self.out} holds another run ({'; '.join(changed)}): choose "
                                   "another --out, or --overwrite it")
            if (self.out / "state.pt").exists():
                return torch.load(self.out / "state.pt", map_location=self.device, weights_only=True)
        return {"stage": "sft", "step": 0}

    def to_do(self, stage: str) -> bool:
        """Whether `stage` is not behind us."""
        return STAGES.index(self.state["stage"]) <= STAGES.index(stage)

    def begin(self, parameters: int) -> None:
        """Once all has loaded: check the room, write config.json, cut metrics.jsonl to the state."""
        size = 12e-9 * parameters  # GB: fp32 weights and Adam's two moments
        with telling(f"--out {self.out} cannot be written"):
            self.out.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.out).free / 1e9
            print(f"{parameters / 1e6:.4g}M parameters, {size:.2g} GB a state, {free:.3g} GB free")
            if free < 3 * size:  # a state, the one before, and models
                raise BadInput(f"--out {self.out} needs {3 * size:.3g} GB of free space")
            (self.out / "config.json").write_text(json.dumps(asdict(self.cfg), indent=1) + "\n")
            with open(self.out / "metrics.jsonl", "a") as file:
                file.truncate(self.state.get("metrics", 0))

    def log(self, stage: str, step: int, metrics: dict) -> None:
        """One line of metrics.jsonl."""
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"stage": stage, "step": step, **metrics}) + "\n")

    def save(self, stage: str, step: int, **parts) -> None:
        """Replace state.pt in one move: after a kill or on a full disk the one before is there."""
        part = self.out / "state.pt.part"
        with telling(f"{stage}, step {step}: the state could not be written, the one before is kept; "
                     "make room and repeat the command", Halt), open(part, "wb") as file:
            written = (self.out / "metrics.jsonl").stat().st_size
            torch.save({"stage": stage, "step": step, "metrics": written, **parts}, file)
            file.flush()
            os.fsync(file.fileno())
            part.rename(self.out / "state.pt")

    def export(self, model, name: str) -> None:
        """out/NAME, a model with its tokenizer in the Hugging Face format; whole or not at all."""
        part = self.out / f"{name}.part"
        if model.can_generate():  # `generate` shall sample what was trained
            model.generation_config.update(do_sample=True, temperature=self.cfg.temperature, top_k=0,
                                           top_p=1.0, eos_token_id=self.tokenizer.eos_token_id)
        model.save_pretrained(part)
        self.tokenizer.save_pretrained(part)
        shutil.rmtree(self.out / name, ignore_errors=True)
        part.rename(self.out / name)

    def autocast(self):
        """bf16 on CUDA. One context around a whole loop: each casts the weights anew."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16)

    def require_finite(self, what: str, values: Tensor, batch: Batch) -> None:
        """Stop, naming the prompt, before a value (b, …) that is not finite can reach the weights."""
        bad = (~values.isfinite()).view(len(values), -1).any(1).nonzero()
        if len(bad):
            prompt = self.tokenizer.decode(unpack(batch)[0][bad[0]])
            raise Halt(f"{self.where}: {what} is not finite for the prompt ending in {prompt[-60:]!r}; "
                       f"the last state in {self.out} is kept")


# ------------------------------------------------------------------------------------------------
# Training: one loop and three losses. The supervised one has one branch, the reward model's two,
# BRAIn's n.
# ------------------------------------------------------------------------------------------------


def make_generator(*key) -> torch.Generator:
    """A generator that its key decides: (seed, stage, step, …)."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(63))


def draw(total: int, size: int, step: int, *key) -> list[int]:
    """The indices of a step: range(total), shuffled anew in each epoch, `size` at a time."""
    places = range(step * size, (step + 1) * size)
    orders = {epoch: torch.randperm(total, generator=make_generator(*key, epoch)).tolist()
              for epoch in {i // total for i in places}}
    return [orders[i // total][i % total] for i in places]


def split_micro(run: Run, prompts: list[list[int]], branch_tokens: int) -> list[list[int]]:
    """Places of the prompts, sorted by length, in groups of at most micro_batch_tokens (or of one).

    A branch's token also has V logits, which take the memory of about V/2¹⁶ more tokens.
    """
    groups, branches = [[]], branch_tokens * (1 + len(run.tokenizer) / 2**16)
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        cost = (len(groups[-1]) + 1) * (len(prompts[i]) + branches)
        groups += [[]] if groups[-1] and cost > run.cfg.micro_batch_tokens else []
        groups[-1].append(i)
    return groups


def text_micros(run: Run, examples: list[Example], columns: tuple, limit: int) -> list[Micro]:
    """Micro-batches of given texts, a branch for each of the columns."""
    prompts = encode(run.tokenizer, [example.prompt for example in examples])
    texts = [encode(run.tokenizer, [getattr(e, c) for e in examples], limit) for c in columns]
    branches = list(zip(*texts, strict=True))
    longest = len(columns) * max(len(y) for ys in branches for y in ys)
    return [Micro(g, pack([prompts[i] for i in g], [list(branches[i]) for i in g], run.device), {})
            for g in split_micro(run, prompts, longest)]


def judge(run: Run, reward_model, batch: Batch) -> dict[str, Tensor]:
    """The one reward that is used everywhere, and what it is made of, each (b, n)."""
    last = batch.branch.gather(-1, batch.length[..., None]).squeeze(-1)
    eos = (last == run.tokenizer.eos_token_id).float()
    raw = score_reward(reward_model, batch, run.tokenizer, run.reward_tokenizer)
    return {"reward": raw - run.cfg.missing_eos_penalty * (1 - eos), "raw_reward": raw, "eos": eos}


@torch.no_grad()
def sample_micros(run: Run, models: dict, name: str, prompts: list, n: int, *key) -> list[Micro]:
    """3.1 sample n responses to each prompt from models[name]; 3.2 score them in the micro-batches,
    and the autocast, of the training step: log q_θ − log q′ is exactly 0 until the first update."""
    cfg, micros = run.cfg, []
    for group in split_micro(run, prompts, n * cfg.max_response_tokens):
        some = [prompts[i] for i in group]
        generators = [make_generator(cfg.seed, *key, i) for i in group]
        with run.autocast():
            start = time.perf_counter()
            responses, log_q = sample(
                models[name], some, n, cfg.max_response_tokens, generator=generators,
                eos_id=run.tokenizer.eos_token_id, temperature=cfg.temperature)
            middle = time.perf_counter()
            batch = pack(some, responses, run.device)
            scores = judge(run, models["reward"], batch)
            log_proposal = sequence_log_prob(models[name], batch, cfg.temperature)
            log_prior = (log_proposal if name == "prior" else
                         sequence_log_prob(models["prior"], batch, cfg.temperature))
        scores |= {"log_prior": log_prior, "log_proposal": log_proposal}
        for what, values in scores.items():
            run.require_finite(what, values, batch)
        check_sampler(run, log_q - log_proposal, batch.length)
        micros.append(Micro(group, batch, scores))
        run.clock += Counter(seconds_sampling=middle - start, tokens_sampled=batch.length.sum().item(),
                             seconds_scoring=time.perf_counter() - middle)
    return micros


def check_sampler(run: Run, gap: Tensor, length: Tensor) -> None:
    """Stop unless what is scored is what was sampled: gap = log q′ (sampler) − log q′ (score)."""
    if run.dtype is torch.float32:  # measured 1.8e-4 over 53 tokens
        bad = (gap.abs() / length.clamp(min=53)).max() > 2e-3 / 53
    else:  # rounding is a random walk; a wrong sampler is a one-sided drift
        bad = (gap / length.sqrt()).square().mean() > 0.15**2 or (gap / length).mean().abs() > 0.01
    if bad:
        raise Halt(f"what is scored is not what was sampled: log q′ differs by {gap.abs().max():.3g} "
                   f"nats; the last state in {run.out} is kept")


def sft_loss(cfg: Config, model, batch: Batch, scores: dict):
    """−log p(reference | prompt) per token, at temperature 1, (b,)."""
    return -sequence_log_prob(model, batch)[:, 0] / batch.length[:, 0], {}


def preference_loss(cfg: Config, model, batch: Batch, scores: dict):
    """−log P(chosen ≻ rejected), (b,): branch 0 is the chosen one."""
    reward = score_reward(model, batch)  # (b, 2)
    right = (reward[:, 0] > reward[:, 1]).float() + (reward[:, 0] == reward[:, 1]).float() / 2
    return bradley_terry_loss(reward[:, 0], reward[:, 1]), {"accuracy": right}


def policy_loss(cfg: Config, model, batch: Batch, scores: dict):
    """3.3 weigh the samples: BRAIn's loss, (b,), and what to watch (README, "Metrics")."""
    log_prior, log_proposal, reward = (scores[k] for k in ("log_prior", "log_proposal", "reward"))
    log_policy = sequence_log_prob(model, batch, cfg.temperature)  # (b, n)
    loss, (alpha, beta) = brain_loss(
        log_policy, log_prior, log_proposal, reward, cfg.kl_coef,
        target=cfg.target, baseline=cfg.baseline, divergence=cfg.divergence)
    rho = log_policy.detach() - log_proposal
    return loss, {
        "reward": reward.mean(-1), "raw_reward": scores["raw_reward"].mean(-1),
        "reward_spread": reward.std(-1) / cfg.kl_coef, "alpha_largest": alpha.amax(-1),
        "ess_alpha": effective_sample_size(alpha), "ess_beta": effective_sample_size(beta),
        "kl_to_prior": (beta * (log_policy.detach() - log_prior)).sum(-1),
        "log_ratio_min": rho.amin(-1), "log_ratio_max": rho.amax(-1),
        "eos_share": scores["eos"].mean(-1), "response_tokens": batch.length.float().mean(-1)}


def run_losses(run: Run, model, micros: list[Micro], loss_of, train: bool) -> dict[str, Tensor]:
    """The one micro-batch driver: losses and metrics of all prompts, and, to train, the gradient of
    the mean loss over the whole step."""
    found, total = defaultdict(list), sum(len(micro.index) for micro in micros)
    for micro in micros:
        with run.autocast(), torch.set_grad_enabled(train):
            loss, metrics = loss_of(run.cfg, model, micro.batch, micro.scores)  # (b,)
        run.require_finite("the loss", loss, micro.batch)
        if train:
            (loss.sum() / total).backward()
        for name, values in {"loss": loss.detach(), **metrics}.items():
            found[name].append(values)
    return {name: torch.cat(values) for name, values in found.items()}


def fit(run: Run, stage: str, model, steps: int, lr: float, micros_of, loss_of) -> None:
    """The one training loop, from the saved state where it is of this stage. `micros_of(step, kept)`
    returns a step's micro-batches, what to keep for the next steps, and metrics."""
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, eps=1e-5, weight_decay=0.0)
    start, kept = 0, []
    if run.state["stage"] == stage and "model" in run.state:
        model.load_state_dict(run.state["model"])
        optimizer.load_state_dict(run.state["optimizer"])
        start, kept = run.state["step"], run.state["kept"]
    run.state, saved = {"stage": stage}, time.monotonic()  # frees the state's memory
    bar = progress(range(start, steps), desc=stage, initial=start, total=steps)
    for step in bar:
        run.where, run.clock = f"{stage}, step {step}", Counter()
        micros, kept, metrics = micros_of(step, kept)
        began = time.perf_counter()
        rate = optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        for name, values in run_losses(run, model, micros, loss_of, train=True).items():
            metrics[name] = dict(min=torch.min, max=torch.max).get(name[-3:], torch.mean)(values).item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.cfg.max_grad_norm)
        run.require_finite("the gradient norm", norm[None], micros[0].batch)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - began
        tokens = sum(micro.batch.length.sum().item() for micro in micros)
        run.log(stage, step, metrics | run.clock | {
            "gradient_norm": norm.item(), "learning_rate": rate, "seconds_stepping": seconds,
            "tokens_per_second_stepping": tokens / seconds, "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9})
        bar.set_postfix({k: f"{v:.3g}" for k, v in metrics.items() if k in ("loss", "reward", "kl_to_prior", "accuracy")})
        due = time.monotonic() - saved > 600 if not run.cfg.save_every else (step + 1) % run.cfg.save_every == 0
        if due or step + 1 == steps:
            run.save(stage, step + 1, model=model.state_dict(), optimizer=optimizer.state_dict(), kept=kept)
            saved = time.monotonic()
    model.requires_grad_(False)


def text_step(run: Run, stage: str, examples: list, columns: tuple, size: int, limit: int, step: int, kept):
    """A step of stage 1 or 2: the next texts of the epoch."""
    index = draw(len(examples), size, step, run.cfg.seed, stage)
    return text_micros(run, [examples[i] for i in index], columns, limit), [], {}


def brain_step(run: Run, models: dict, examples: list, exact, step: int, kept: list):
    """A step of stage 3: the next prompts of the refresh, or of a new one when they are used up."""
    cfg, metrics, size = run.cfg, {}, run.cfg.prompts_per_step
    turn, turns = step % (cfg.prompts_per_refresh // size), cfg.prompts_per_refresh // size
    if turn == 0:
        index = draw(len(examples), cfg.prompts_per_refresh, step // turns, cfg.seed, "brain")
        prompts = encode(run.tokenizer, [examples[i].prompt for i in index])
        name = "policy" if cfg.proposal == "lagged" else "prior"
        fresh = [sample_micros(run, models, name, prompts[i : i + size], cfg.samples_per_prompt, step, i)
                 for i in range(0, len(prompts), size)]
        metrics = refresh_metrics(run, models, exact, step, turns, list(itertools.chain(*fresh)))
        kept = [[(m.index, tuple(m.batch), m.scores) for m in micros] for micros in fresh]
    device = run.device  # the kept ones may come from a state file
    return [Micro(index, Batch(*(t.to(device) for t in batch)), {k: t.to(device) for k, t in scores.items()})
            for index, batch, scores in kept[turn]], kept, metrics


def refresh_metrics(run: Run, models: dict, exact, step: int, turns: int, micros: list[Micro]) -> dict:
    """What a refresh's fresh samples say of their sampler; warnings; ten times a run, a line."""
    cfg, scores = run.cfg, {k: torch.cat([m.scores[k] for m in micros]) for k in micros[0].scores}
    ratio, reward = scores["log_proposal"] - scores["log_prior"], scores["reward"]  # (B, n)
    metrics = {"refresh_reward": reward.mean().item(), "refresh_kl": ratio.mean().item()}
    if reward.std(-1).mean() > 5 * cfg.kl_coef:
        tqdm.write(f"warning, step {step}: rewards spread by over 5 kl_coef within a prompt, so that the "
                   "posterior is practically argmax: raise --kl_coef")
    if not scores["eos"].any():
        tqdm.write(f"warning, step {step}: no response ends; the policy may have collapsed")
    if step % max(turns, cfg.steps // 10 // turns * turns) == 0:
        if exact:
            log_policy = exact_log_prob(run, models["policy"], exact.prompts)
            metrics["kl_to_posterior"] = kl(exact.log_posterior, log_policy).mean().item()
        tqdm.write(f"brain, step {step} of {cfg.steps}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
    if step == 0:
        tqdm.write(f"log policy − log prior before the first step: {ratio.mean():.2g} ± {ratio.std():.2g}"
                   " nats; a KL below this is arithmetic")
    return metrics


# ------------------------------------------------------------------------------------------------
# Evaluation and report
# ------------------------------------------------------------------------------------------------


class Exact(NamedTuple):
    """Distributions over all of Y, every response that the sampler can emit, for p prompts."""

    prompts: list[list[int]]
    log_prior: Tensor  # (p, |Y|)
    reward: Tensor  # (p, |Y|)
    log_posterior: Tensor  # (p, |Y|)


@torch.no_grad()
def exact_log_prob(run: Run, model, prompts: list[list[int]]) -> Tensor:
    """log q(y|x) of all of Y, (p, |Y|): shorter responses first, each length in lexical order."""
    eos, R, rows = run.tokenizer.eos_token_id, run.cfg.max_response_tokens, []
    others = [i for i in range(model.config.vocab_size) if i != eos]
    prefixes = [list(y) for y in itertools.product(others, repeat=R - 1)]  # hold all shorter ones
    for prompt in prompts:
        output, n, g = feed_branches(model, model, pack([prompt], [prefixes], run.device), R)
        log_p = (unfold(output.logits, n, g)[0] / run.cfg.temperature).log_softmax(-1)  # (n, R, V)
        ends, path = [], torch.zeros(1, device=run.device)  # path: log q of every k ids so far
        for k in range(R):
            longer = path[:, None] + log_p[:: len(others) ** (R - 1 - k), k]  # (|path|, V)
            ends.append(longer[:, eos])
            path = longer[:, others].flatten()
        rows.append(torch.cat([*ends, path]))
    return torch.stack(rows)


@torch.no_grad()
def enumerate_posterior(run: Run, models: dict, prompts: list[list[int]]) -> Exact | None:
    """The posterior itself where the response space is small enough to list (toy), else None."""
    V, eos, R = models["prior"].config.vocab_size, run.tokenizer.eos_token_id, run.cfg.max_response_tokens
    if V**R > 50_000:
        return None
    others = [i for i in range(V) if i != eos]
    space = [[*y, eos] for k in range(R) for y in itertools.product(others, repeat=k)]
    space += [list(y) for y in itertools.product(others, repeat=R)]
    reward = torch.cat([judge(run, models["reward"], pack([x], [space], run.device))["reward"]
                        for x in progress(prompts, desc="enumerating")])
    log_prior = exact_log_prob(run, models["prior"], prompts)
    log_posterior = log_alpha_hat(log_prior, 0.0, reward, run.cfg.kl_coef, "posterior")
    return Exact(prompts, log_prior, reward, log_posterior)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of explicit distributions, (p,)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def preference(a: Tensor, b: Tensor) -> Tensor:
    """Per prompt, the share of pairs that a wins, (P,): rewards (P, m) and (P, k); ties are half."""
    a, b = a[:, :, None], b[:, None]
    return ((a > b).float() + (a == b).float() / 2).mean((1, 2))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean and standard error over prompts, (P,)."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def wilson(wins: Tensor) -> tuple[float, list[float]]:
    """Mean and 95 % interval of a win rate from per-prompt shares (P,): Wilson's score interval at
    the number of independent trials that has the same standard error."""
    rate, error = mean_and_error(wins.double())
    trials = rate * (1 - rate) / error**2 if error else len(wins)
    z = 1.96
    middle = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z*z/trials) * math.sqrt(rate * (1 - rate) / trials + (z / (2 * trials)) ** 2)
    return rate, [middle - half, middle + half]


@torch.no_grad()
def evaluate(run: Run, models: dict, examples: list[Example]) -> dict[str, dict]:
    """Stage 4: what there is to know of prior, policy and references on held-out prompts, from fresh
    samples: {name: {"reward": (P, m), …, "responses": P lists}}, in the order of the examples."""
    prompts, found = encode(run.tokenizer, [example.prompt for example in examples]), {}
    groups = {name: sample_micros(run, models, name, prompts, run.cfg.eval_samples, "eval", name)
              for name in ("prior", "policy")}
    if all(example.reference for example in examples):
        groups["reference"] = text_micros(run, examples, ("reference",), sys.maxsize)  # whole, with eos
    for name, micros in groups.items():
        for micro in micros if name == "reference" else []:
            with run.autocast():
                micro.scores.update(judge(run, models["reward"], micro.batch))
        order = torch.tensor([i for micro in micros for i in micro.index]).argsort()
        found[name] = {k: torch.cat([m.scores[k].cpu() for m in micros])[order] for k in micros[0].scores}
        found[name]["tokens"] = torch.cat([m.batch.length.cpu() for m in micros])[order].float()
        responses = [ys for micro in micros for ys in unpack(micro.batch)[1]]
        found[name]["responses"] = [responses[i] for i in order]
    return found


def summarise(found: dict[str, dict], exact: Exact | None) -> dict[str, dict]:
    """A row of figures for each of prior, policy, reference and, where it is known, posterior."""
    rows, wins = {}, defaultdict(dict)
    for name, of in found.items():
        rows[name] = {key: of[key].mean().item() for key in ("reward", "raw_reward", "tokens", "eos")}
        wins[name] = {other: preference(of["reward"], found[other]["reward"])
                      for other in ("prior", "reference") if other in found and other != name}
        if name != "reference":
            ratio = of["log_proposal"] - of["log_prior"]  # (P, m) log q − log p, q its own sampler
            rows[name]["kl"], rows[name]["kl_se"] = mean_and_error(ratio.mean(-1))
    if exact:  # the ceiling: expectations under the posterior itself, over all of Y
        prior, posterior, reward = exact.log_prior.exp(), exact.log_posterior.exp(), exact.reward
        ranked, order = reward.sort(-1)
        cdf = F.pad(prior.gather(-1, order).cumsum(-1), (1, 0))  # the prior's, by reward
        less, upto = (cdf.gather(-1, torch.searchsorted(ranked, reward, right=r)) for r in (False, True))
        wins["posterior"] = {"prior": (posterior * (less + upto) / 2).sum(-1).cpu()}
        rows["posterior"] = {"reward": (posterior * reward).sum(-1).mean().item(),
                             "kl": kl(exact.log_posterior, exact.log_prior).mean().item()}
    for name, others in wins.items():
        for other, shares in others.items():
            rows[name][f"vs_{other}"], rows[name][f"vs_{other}_ci"] = wilson(shares)
    return rows


def chart(title: str, x: str, y: str, points: list[tuple[float, float]]) -> list[str]:
    """A Mermaid line chart of up to 12 of the points, evenly chosen, first and last among them."""
    chosen = [points[round(i * (len(points) - 1) / 11)] for i in range(12)] if len(points) > 12 else points
    labels, values = ", ".join(f'"{a:.3g}"' for a, _ in chosen), ", ".join(f"{b:.4f}" for _, b in chosen)
    low, high = min(b for _, b in chosen), max(b for _, b in chosen)
    return ["```mermaid", '%%{init: {"themeVariables": {"xyChart": {"plotColorPalette": "#d62728"}}}}%%',
            "xychart-beta", f'    title "{title}"', f'    x-axis "{x}" [{labels}]',
            f'    y-axis "{y}" {min(0, low):.3f} --> {high:.3f}', f"    line [{values}]", "```", ""]


def report(run: Run, rows: dict, found: dict, examples: list[Example], notes: list[str]) -> None:
    """report.md: notes, the table, a chart and samples. All but the chart is printed as well."""
    table = ["| | reward | wins against prior | wins against reference | KL to prior, nats | tokens "
             "| end in eos |", "|---" * 7 + "|"]
    for name, row in rows.items():
        wins = [f"{row[k]:.3f} [{row[k + '_ci'][0]:.3f}, {row[k + '_ci'][1]:.3f}]" if k in row else ""
                for k in ("vs_prior", "vs_reference")]
        price = f"{row['kl']:.3f}" + (f" ± {row['kl_se']:.3f}" if "kl_se" in row else "") if "kl" in row else ""
        rest = [f"{row[k]:.2f}" if k in row else "" for k in ("tokens", "eos")]
        table.append(f"| {' | '.join([name, format(row['reward'], '.3f'), *wins, price, *rest])} |")
    samples = []
    for i, example in enumerate(examples[:4]):
        samples += ["", f"Prompt: …{example.prompt[-200:]!r}", ""]
        samples += [f"- {name}: {run.tokenizer.decode(of['responses'][i][0])!r}" for name, of in found.items()]
    lines = [json.loads(line) for line in open(run.out / "metrics.jsonl")]
    exact = [(line["step"], line["kl_to_posterior"]) for line in lines if "kl_to_posterior" in line]
    trade = [(line["refresh_kl"], line["refresh_reward"]) for line in lines if "refresh_kl" in line]
    picture = chart("Exact KL(posterior || policy)", "step", "nats", exact) if exact else chart(
        "Reward against KL, one point a refresh", "KL to the prior (nats)", "reward", trade)
    text = [f"# BRAIn on {run.cfg.task}", "", *notes, "", *table, "", *picture, "## Samples", *samples, ""]
    (run.out / "report.md").write_text("\n".join(text))
    width = shutil.get_terminal_size((160, 24)).columns
    print("\n".join(line[:width] for line in [*notes, "", *table, *samples, "", f"report: {run.out / 'report.md'}"]))


# ------------------------------------------------------------------------------------------------
# Derivation checks: brain_loss and autograd on one side, the equations written out on the other.
# Short names as in the paper: q = log q_θ, p = log p, q1 = log q′, r the reward, each (B, n).
# ------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """A claim of the method and the largest absolute difference between its two sides."""

    name: str
    claim: str
    error: float
    tolerance: float
    ok: bool


def compare(name: str, claim: str, leaf: Tensor, loss: Tensor, value: Tensor, slope: Tensor):
    gradient = torch.autograd.grad(loss.sum(), leaf)[0]
    error = torch.cat([(loss - value)[:, None], gradient - slope], -1).abs().max().item()
    return Check(name, claim, error, 1e-12, error <= 1e-12)


def shares(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def baseline_checks(q: Tensor, p: Tensor, q1: Tensor, r: Tensor, kl_coef: float) -> list[Check]:
    n, ratio = q.shape[-1], (q - q1).exp()  # exp(ρ) = q_θ/q′
    alpha = shares((p + r / kl_coef - q1).exp())  # α̂ ∝ p·exp(r/kl_coef)/q′
    terms = {"none": (0, 0 * ratio), "unnormalized": (ratio.mean(-1) - 1, ratio / n),
             "self_normalized": (ratio.mean(-1).log(), shares(ratio))}  # A(ρ) and b; here b = β̂
    return [compare(
        baseline, "Section 4: Σ α̂(log(nα̂) − ρ) + A has gradient −Σ(α̂ − b)∇log q_θ, b = A′(ρ).",
        q, brain_loss(q, p, q1, r, kl_coef, baseline=baseline)[0],
        (alpha * (n * alpha / ratio).log()).sum(-1) + normaliser, b - alpha,
    ) for baseline, (normaliser, b) in terms.items()]


def relative_checks(q: Tensor, p: Tensor, q1: Tensor, r: Tensor, kl_coef: float) -> list[Check]:
    x, y, s = q[:, :2], p[:, :2], r[:, :2]  # n = 2 samples of the prior
    sign = (s - s.flip(-1)).sign()  # +1 chosen, −1 rejected
    odds = (sign * (x - y)).sum(-1, keepdim=True).exp()  # exp(Δ), Δ = Δ log(q_θ/p)
    dpo = compare("DPO", "Section 5: argmax of two samples of the prior is DPO-sft, −log σ(Δ).",
                  x, brain_loss(x, y, y, s, kl_coef, target="argmax")[0],
                  (1 + 1 / odds[:, 0]).log(), -sign / (1 + odds))
    alpha, beta = shares((p + r / kl_coef - q1).exp()), shares((q - q1).exp())  # α̂, β̂
    total = r - kl_coef * (q - p)  # R = r − kl_coef·log(q_θ/p)
    advantage = total - (beta * total).sum(-1, keepdim=True)  # Rᵢ − Σⱼ β̂ⱼRⱼ
    reverse = compare(
        "reverse", "Section 5: KL(β̂ ‖ α̂) has the policy gradient −Σ β̂(R − Σβ̂R)∇log q_θ/kl_coef.",
        q, brain_loss(q, p, q1, r, kl_coef, divergence="reverse")[0],
        (beta * (beta / alpha).log()).sum(-1), -beta * advantage / kl_coef)
    posterior, policy = shares((p + r / kl_coef).exp()), shares(q.exp())  # over Y, each y once
    uniform = torch.full_like(q, -math.log(q.shape[-1]))
    true_kl = compare("true KL", "Section 4: on all of Y the loss is the true KL(posterior ‖ q_θ).",
                      q, brain_loss(policy.log(), p, uniform, r, kl_coef)[0],
                      (posterior * (posterior / policy).log()).sum(-1), policy - posterior)
    return [dpo, reverse, true_kl]


def derivation_checks() -> list[Check]:
    """What the method rests on, in float64; right-hand sides in nothing but exp, log, sum."""
    drawn = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, p, q1, r = drawn.requires_grad_()  # then one tensor in all four places: α̂ and q′ pass no ∇
    attached = [check._replace(name=f"{check.name}, one tensor")
                for check in baseline_checks(q, q, q, q, kl_coef=0.7)]
    return [*baseline_checks(q, p, q1, r, kl_coef=0.7), *attached,
            *relative_checks(q, p, q1, r, kl_coef=0.7)]


# ------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------


def toy_model(cfg: Config):
    """A tokenizer of 12 words and a GPT-NeoX of 0.1M parameters that knows nothing yet."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(["<eos>", TLDR.strip(), *KEYS, *FILLERS])},
                                       unk_token="<eos>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")
    torch.manual_seed(cfg.seed)
    return tokenizer, AutoModelForCausalLM.from_config(transformers.GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=32, bos_token_id=0, eos_token_id=0)).eval()


def load_policy(run: Run, name: str | None):
    """Tokenizer and model to start from, checked against each other and against the limits."""
    cfg = run.cfg
    if name is None:
        run.tokenizer, model = toy_model(cfg)
    else:
        run.tokenizer, model = load_tokenizer(name), load_model(AutoModelForCausalLM, name)
    if run.tokenizer.eos_token_id is None:
        raise BadInput(f"the tokenizer of {name} has no end-of-text token (eos)")
    if len(run.tokenizer) > model.config.vocab_size:
        raise BadInput(f"{name}: {len(run.tokenizer)} tokens, but embeddings for {model.config.vocab_size}")
    longest = cfg.max_prompt_tokens + max(cfg.max_response_tokens, 0 if cfg.reward else cfg.max_comparison_tokens)
    if longest > (context := getattr(model.config, "max_position_embeddings", None) or math.inf):
        raise BadInput(f"the longest prompt and response have {longest} tokens, the model's context "
                       f"{context}: lower --max_prompt_tokens or --max_response_tokens (or _comparison_)")
    check_branches(model.to(run.device), cfg)
    return model


def load_reward(run: Run, name: str):
    """A reward model, and in run.reward_tokenizer its tokenizer if that is not the policy's."""
    model = load_model(AutoModelForSequenceClassification, name).to(run.device)
    own = load_tokenizer(name)
    if own.get_vocab() != run.tokenizer.get_vocab():
        run.reward_tokenizer = own
    if hasattr(model, "score"):
        check_branches(model, run.cfg)
    return model.to(run.dtype)


def need(examples: list[Example], column: str, flag: str) -> list[Example]:
    """The examples that have a column, or BadInput where a stage cannot do without."""
    some = [example for example in examples if getattr(example, column) is not None]
    if not some:
        raise BadInput(f"no row has a {column} to train on: give {flag}, or such rows")
    return some


def fit_texts(run: Run, stage: str, model, train: list, test: list, columns: tuple, limit: int, loss_of):
    """Stage 1 or 2 if it is still to do; then its losses and metrics (N,) on held-out texts."""
    cfg = run.cfg
    size, epochs, lr = (getattr(cfg, f"{stage}_{name}") for name in ("batch", "epochs", "lr"))
    if run.to_do(stage):
        steps = math.ceil(epochs * len(train) / size)
        fit(run, stage, model, steps, lr,
            functools.partial(text_step, run, stage, train, columns, size, limit), loss_of)
        run.export(model, "prior" if stage == "sft" else "reward")
    some = [e for e in test if getattr(e, columns[0]) is not None][: cfg.eval_prompts]
    return run_losses(run, model, text_micros(run, some, columns, limit), loss_of, train=False)


def execute(cfg: Config) -> dict:
    """Stages 1 to 4; returns the figures of the last line."""
    run, began = Run(cfg), time.time()
    cfg, folder = run.cfg, run.out
    if not run.to_do("brain"):
        print(f"this run is finished, see {folder / 'report.md'}; --overwrite starts afresh")
        return run.state["result"]
    model = load_policy(run, cfg.prior or (cfg.base if run.to_do("sft") else str(folder / "prior")))
    given = cfg.reward or (None if run.to_do("reward") else str(folder / "reward"))
    reward_model = load_reward(run, given) if given else None
    train, test = (load_task(cfg, split, run.tokenizer) for split in ("train", "test"))
    references, pairs = ([e for e in train if getattr(e, key) is not None] for key in ("reference", "chosen"))
    if not (references or cfg.prior) or not (pairs or cfg.reward):
        raise BadInput("no row has a reference to train a prior on, or none a pair to train a reward "
                       "model on: add them, or give --prior and --reward")
    run.begin(sum(p.numel() for p in model.parameters()))
    print(" ".join(f"{name}={value}" for name, value in asdict(cfg).items()), flush=True)
    if cfg.device == "cuda":  # TF32 holds the bf16 inputs of the heads exactly
        torch.set_float32_matmul_precision("high")
    notes = [f"Task {cfg.task}, seed {cfg.seed}: {cfg.steps} steps of {cfg.prompts_per_step} prompts × "
             f"{cfg.samples_per_prompt} samples, kl_coef {cfg.kl_coef}; {run.where}."]
    if not cfg.prior:  # stage 1
        found = fit_texts(run, "sft", model, references, test, ("reference",), cfg.max_response_tokens, sft_loss)
        notes.append(f"Prior: {found['loss'].mean():.3f} nats a token on {len(found['loss'])} held-out references.")
    if not cfg.reward:  # stage 2
        if reward_model is None:
            torch.manual_seed(cfg.seed)  # decides the new head
            source = cfg.prior or str(folder / "prior")
            reward_model = load_model(AutoModelForSequenceClassification, source, new_head=True).to(run.device)
        right = fit_texts(run, "reward", reward_model, pairs, test, ("chosen", "rejected"),
                          cfg.max_comparison_tokens, preference_loss)["accuracy"]
        rate, (low, high) = wilson(right)
        notes.append(f"Reward model: {rate:.3f} [{low:.3f}, {high:.3f}] of {len(right)} held-out pairs right.")
    print("\n".join(notes[1:]), flush=True)
    prior = model.to(run.dtype)  # stage 3; the policy starts from the prior's rounded weights
    models = {"prior": prior, "reward": reward_model.to(run.dtype), "policy": copy.deepcopy(prior).float()}
    index = draw(len(test), min(cfg.eval_prompts, len(test)), 0, cfg.seed, "eval")
    examples = [test[i] for i in index]
    exact = enumerate_posterior(run, models, encode(run.tokenizer, [e.prompt for e in examples[:16]]))
    prompts = [e for e in train if e.reference is not None or e.chosen is None]  # no mere comparisons
    fit(run, "brain", models["policy"], cfg.steps, cfg.lr,
        functools.partial(brain_step, run, models, prompts, exact), policy_loss)
    run.export(models["policy"], "policy")
    found = evaluate(run, models, examples)  # stage 4
    rows, policy = summarise(found, exact), found["policy"]
    result = {"task": cfg.task, "steps": cfg.steps, "seconds": round(time.time() - began, 1)}
    result |= {f"reward_{name}": rows[name]["reward"] if name in rows else None
               for name in ("prior", "policy", "reference")}
    result |= {f"win_rate_{key}": rows["policy"].get(key) for key in
               ("vs_prior", "vs_prior_ci", "vs_reference", "vs_reference_ci")}
    result |= {"kl_to_prior": rows["policy"]["kl"], "kl_to_prior_se": rows["policy"]["kl_se"],
               "eos_share": rows["policy"]["eos"], "response_tokens": rows["policy"]["tokens"]}
    if exact:
        log_policy = exact_log_prob(run, models["policy"], exact.prompts)
        ratio = (policy["log_proposal"] - policy["log_prior"])[: len(exact.prompts)]  # (p, m)
        result |= {"kl_to_posterior_start": kl(exact.log_posterior, exact.log_prior).mean().item(),
                   "kl_to_posterior_end": kl(exact.log_posterior, log_policy).mean().item(),
                   "kl_to_prior_exact": kl(log_policy, exact.log_prior).mean().item(),
                   "kl_to_prior_same_prompts": ratio.mean().item(),
                   "kl_to_prior_same_prompts_se": math.sqrt(ratio.var(-1).sum().item() / ratio.numel() / len(ratio))}
    report(run, rows, found, examples, notes)
    run.save("done", cfg.steps, result=result)
    return result


def main(argv: list[str] | None = None) -> int:
    """0: done; 1: a check failed or a guard stopped the run; 2: bad input; 130: Ctrl-C."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        cfg = parse_config(argv)
        if cfg.check:
            checks = derivation_checks()
            for check in checks:
                print(f"{'ok  ' if check.ok else 'FAIL'} {check.error:.1e} (≤ {check.tolerance:.0e})  {check.name}: {check.claim}")
            return int(not all(check.ok for check in checks))
        print(json.dumps(execute(cfg)))
        return 0
    except BadInput as error:
        print(f"brain.py: {error}", file=sys.stderr)
        return 2
    except (Halt, OSError) as error:
        print(f"brain.py: stopped: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"brain.py: out of memory: lower --micro_batch_tokens, then repeat the command", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("brain.py: interrupted; the same command continues from the last saved state", file=sys.stderr)
        return 130
    except SystemExit as stop:  # --help
        return stop.code


if __name__ == "__main__":
    sys.exit(main())
