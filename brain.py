"""BRAIn: Bayesian reward-conditioned amortized inference, in one file (arXiv 2402.02479).

Condition the supervised model p(y|x) on "this answer is good", G = 1, which a reward model r says
with p(G=1|x, y) ∝ exp(r(x, y)/kl_coef). By Bayes' rule the posterior is p(y|x, G=1) ∝
p(y|x)·exp(r(x, y)/kl_coef), the optimum of E_q[r] − kl_coef·KL(q‖p). It can be weighed but not
sampled from, so distil it: draw n answers to a prompt from a proposal q′, the policy of a moment
ago, weigh them by self-normalised importance sampling (SNIS), step the policy q_θ on KL(α̂ ‖ β̂):

    α̂ = softmax(log p + r/kl_coef − log q′)   is the posterior's share of each of the n answers,
    β̂ = softmax(log q_θ − log q′)             the policy's share, a self-normalised baseline, and
    −Σᵢ (α̂ᵢ − β̂ᵢ) ∇log q_θ(yᵢ)                the gradient: exactly 0 once the policy is right.

Legend: B prompts (b in a micro-batch), n responses to each, P prompt and R response tokens, V
    vocabulary; a response is a branch of its prompt, and g branches share a row.
    log_prior   p, the supervised (SFT) model     log_proposal  q′, which sampled the responses
    log_policy  q_θ, the model being trained      reward        r(x, y), from the reward model
    A log-probability is of a whole response, in nats, summed over its tokens with end-of-text.

Stages of `python brain.py --task toy|tldr|hh|jsonl`; a checkpoint that is given skips its stage:
    1 sft     fine-tune --base on the references               out/TASK/prior,  or --prior
    2 reward  train a reward model on the comparisons          out/TASK/reward, or --reward
    3 brain   3.1 sample  3.2 score  3.3 weigh  3.4 step       out/TASK/policy
    4 eval    fresh samples on held-out prompts                out/TASK/report.md

Departures from the paper:
    1 Its hyper-parameters could not be reached: the defaults are our own.
    2 Prior, policy and posterior are all of softmax(logits/temperature), 0.7 on tldr.
    3 The proposal is the policy of the last refresh; the abstract describes --proposal prior.
    4 log q′ is the policy's score of the samples, not the sampler's own: rounding cancels in β̂.
    5 A response without end-of-text pays missing_eos_penalty.
    6 Supervised fine-tuning averages nats over a response's tokens.
"""

import contextlib
import copy
import fcntl
import gzip
import inspect
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import sys
import tempfile
import time
import traceback
from collections import namedtuple
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import file_download, utils
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


@dataclass(frozen=True)
class Config:
    """A run. Each field is a flag, its comment the flag's help; default < task's preset < flag."""

    task: Literal["toy", "tldr", "hh", "jsonl"] = "toy"  # what to learn, from which files
    base: str | None = None  # hub name or folder of a model to fine-tune into the prior
    prior: str | None = None  # hub name or folder of a supervised model: skips stage 1
    reward: str | None = None  # the same of a reward model, or FILE.py: skips stage 2
    data_dir: str | None = None  # where the data files lie, and where downloads go
    hh_subsets: str = "harmless-base helpful-base"  # folders of hh, separated by spaces
    out: str | None = None  # the run's folder; out/TASK by default
    overwrite: bool = False  # replace the run in --out by a fresh one
    check: bool = False  # print the derivation checks, nothing else
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    seed: int = 0  # reaches every draw
    max_prompt_tokens: int = 512  # longer prompts are skipped
    max_response_tokens: int = 128  # limit of sampling and of sft, end-of-text included
    max_comparison_tokens: int = 256  # limit of the responses that train a reward model
    temperature: float = 1.0  # after sft, every model is softmax(logits / temperature)
    missing_eos_penalty: float = 1.0  # reward units, off a response without end-of-text
    sft_lr: float = 1e-5  # first learning rate of stage 1; each decays linearly to 0
    sft_batch: int = 64  # references a step
    sft_epochs: int = 1  # passes over the references
    reward_lr: float = 3e-6  # first learning rate of stage 2
    reward_batch: int = 64  # pairs a step
    reward_epochs: int = 1  # passes over the comparisons
    lr: float = 1e-6  # first learning rate of stage 3
    steps: int = 1000  # optimizer steps of stage 3
    samples_per_prompt: int = 8  # n, at least 2
    prompts_per_step: int = 32  # prompts a step of stage 3
    prompts_per_refresh: int = 128  # prompts sampled at a time: a multiple of the above
    kl_coef: float = 0.5  # reward units that a nat of KL to the prior costs; small is greedy
    target: Literal["posterior", "argmax"] = "posterior"  # alpha: the posterior, or the best sample
    baseline: Literal["none", "unnormalized", "self_normalized"] = "self_normalized"  # see README
    divergence: Literal["forward", "reverse"] = "forward"  # KL(alpha||beta), or KL(beta||alpha)
    proposal: Literal["lagged", "prior"] = "lagged"  # who samples: the policy, or the prior
    max_grad_norm: float = 1.0  # larger gradients are scaled down to this norm
    micro_batch_tokens: int = 16384  # tokens a forward pass; lower it if memory runs out
    save_every: int = 100  # steps between saved states, rounded up to whole refreshes
    eval_prompts: int = 256  # held-out prompts of the evaluation, at least 3
    eval_samples: int = 4  # responses to each of them, at least 2

PRESETS = {  # what differs from above; tldr's and hh's are for 1B checkpoints on an H100 or H200
    "toy": dict(max_prompt_tokens=16, max_response_tokens=4, max_comparison_tokens=4, kl_coef=0.4,
                sft_lr=3e-3, sft_epochs=4, reward_lr=1e-3, reward_epochs=4, lr=2e-3, steps=400,
                prompts_per_refresh=64, save_every=50),
    "tldr": dict(prior="cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr", data_dir="data/tldr",
                 reward="cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr", temperature=0.7,
                 max_response_tokens=53, max_comparison_tokens=169, sft_lr=3e-6, sft_batch=128,
                 device="cuda"),
    "hh": dict(prior="lomahony/eleuther-pythia1b-hh-sft", data_dir="data/hh-rlhf"),
    "jsonl": dict(data_dir="data")}

# ---- The paper: pure functions of (B, n) log-probabilities and rewards, in their own dtype ------
BRAIN = ("posterior", "self_normalized")  # target and baseline, the only ones with a reverse
Weights = namedtuple("Weights", "alpha_hat beta_hat")  # shares of the n samples, rows sum to 1

def snis_weights(log_policy: Tensor, log_prior: Tensor, log_proposal: Tensor, reward: Tensor,
                 kl_coef: float, target: str = "posterior") -> Weights:
    """Self-normalised importance weights: α̂ of the posterior, β̂ of the policy (section 4), from
    (B, n) log-probabilities of whole responses, in nats, and rewards, in the reward model's units.
    ValueError for unequal shapes, kl_coef ≤ 0 or an unknown target."""
    if not log_policy.shape == log_prior.shape == log_proposal.shape == reward.shape:
        raise ValueError("log_policy, log_prior, log_proposal and reward need one shape, (B, n)")
    if not kl_coef > 0:
        raise ValueError(f"kl_coef must be positive, not {kl_coef}")

    if target == "posterior":  # p(y|x, G=1) ∝ p(y|x)·exp(r/kl_coef), over q′; Z(x) cancels
        alpha_hat = (log_prior + reward / kl_coef - log_proposal).softmax(-1)  # (B, n)
    elif target == "argmax":  # kl_coef → 0: all weight on the highest reward, shared among ties
        best = (reward == reward.amax(-1, keepdim=True)).to(reward)  # (B, n)
        alpha_hat = best / best.sum(-1, keepdim=True)
    else:
        raise ValueError(f"target must be posterior or argmax, not {target!r}")
    beta_hat = (log_policy - log_proposal).softmax(-1)  # (B, n)
    return Weights(alpha_hat, beta_hat)

def brain_loss(log_policy: Tensor, log_prior: Tensor, log_proposal: Tensor, reward: Tensor,
               kl_coef: float, *, target: str = "posterior", baseline: str = "self_normalized",
               divergence: str = "forward") -> tuple[Tensor, Weights]:
    """BRAIn's loss, KL(α̂ ‖ β̂) by default, per prompt (B,) in nats, and the detached weights.
    Differentiable in log_policy alone, with gradient −Σᵢ (α̂ᵢ − bᵢ) ∇log q_θ(yᵢ). The baseline
    b = ∂A/∂log q_θ(yᵢ), which is 0, exp(ρᵢ)/n or β̂ᵢ, comes of a term A(ρ), an estimate of the 0
    that is log Σ_y q_θ(y|x). Divergence "reverse" is KL(β̂ ‖ α̂), the policy-gradient side. Inputs
    and errors: snis_weights; an unknown dial, or reverse with another one turned: ValueError."""
    log_prior, log_proposal, reward = log_prior.detach(), log_proposal.detach(), reward.detach()
    alpha, beta = snis_weights(log_policy, log_prior, log_proposal, reward, kl_coef, target)
    rho = log_policy - log_proposal  # (B, n) ρ = log q_θ − log q′
    n = rho.shape[-1]

    normaliser = {"none": torch.zeros_like(rho[..., 0]),  # A(ρ), (B,): DPG
                  "unnormalized": rho.exp().mean(-1) - 1,  # the log, linear at 1: GDC++
                  "self_normalized": rho.logsumexp(-1) - math.log(n)}  # the log: BRAIn
    if divergence == "forward" and baseline in normaliser:  # with 0·log 0 = 0
        loss = (torch.xlogy(alpha, n * alpha) - alpha * rho).sum(-1) + normaliser[baseline]
    elif divergence == "reverse" and (target, baseline) == BRAIN:
        log_alpha = (log_prior + reward / kl_coef - log_proposal).log_softmax(-1)  # (B, n)
        loss = (beta * (rho.log_softmax(-1) - log_alpha)).sum(-1)  # (B,)
    else:
        raise ValueError(f"no loss has {target=}, {baseline=}, {divergence=}")
    return loss, Weights(alpha, beta.detach())

def bradley_terry_loss(reward_chosen: Tensor, reward_rejected: Tensor) -> Tensor:
    """−log P(chosen ≻ rejected) = −log σ(Δr) per pair (B,): P(y₁ ≻ y₂) = g₁/(g₁+g₂), g = exp(r)."""
    return -F.logsigmoid(reward_chosen - reward_rejected)  # (B,)

def effective_sample_size(weights: Tensor) -> Tensor:
    """Kish's 1/Σᵢwᵢ² per prompt (B,) of weights (B, n) that sum to 1: between 1 and n."""
    return 1 / weights.square().sum(-1)

# ---- Command line, and errors told in one line --------------------------------------------------
LEAST = dict(seed=0, missing_eos_penalty=0, samples_per_prompt=2, eval_samples=2, eval_prompts=3)

class Stop(Exception):
    """A user's mistake: ends the program with one line and this status."""
    status = 2

class Guard(Stop):
    """A number that cannot be trusted, or a disk that is full."""
    status = 1

def refuse_if(wrong, why):
    """Stop for a user's mistake."""
    if wrong:
        raise Stop(why)

@dataclass
class explain(contextlib.AbstractContextManager):
    """What fails inside the block ends the program in one line that begins with `what`."""
    what: str
    kind: type = Stop

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception | SystemExit):
            kind = kind if isinstance(error, Stop) else self.kind
            raise kind(f"{self.what}: {one_line(error)}") from error

def one_line(error):
    """What an error says, in one line; on a CPU torch calls memory that runs out a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        return "out of memory: repeat with a lower --micro_batch_tokens"
    return " ".join(str(error).split())[:300] or type(error).__name__

def parse_config(argv: list[str] | None = None) -> Config:
    """The resolved configuration of a command line; Stop before anything is loaded."""
    parser = transformers.HfArgumentParser(Config, allow_abbrev=False)
    parser.error = partial(refuse_if, True)  # one line, no usage text
    parser.format_help = partial(inspect.getsource, Config)
    given, _ = parser.parse_known_args(argv)  # what the user said, without a preset
    preset = PRESETS[given.task] | dict(out=given.out or f"out/{given.task}")
    parser.set_defaults(**preset | (dict(prior=None, reward=None) if given.base else {}))
    cfg = Config(**vars(parser.parse_args(argv)))

    for name, value in asdict(cfg).items():
        refuse_if(value == "", f"--{name} is empty; is a variable unset?")
        least = LEAST.get(name, 1 if type(value) is int else 1e-12)
        refuse_if(type(value) in (int, float) and not least <= value <= 1e9,
                  f"--{name} must be between {least} and 1e9, not {value}")
    refuse_if(cfg.base and cfg.prior, "--base is made into the prior: give no --prior beside it")
    refuse_if(cfg.task != "toy" and not (cfg.base or cfg.prior), "--base or --prior is needed")
    refuse_if(cfg.prompts_per_refresh % cfg.prompts_per_step,
              "--prompts_per_refresh must be a multiple of --prompts_per_step")
    refuse_if(cfg.divergence == "reverse" and (cfg.target, cfg.baseline) != BRAIN,
              "--divergence reverse needs --target posterior and --baseline self_normalized")
    return cfg

# ---- Data: four tasks, one Example --------------------------------------------------------------
TLDR_URL = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
HH_URL = "https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main"
TLDR, TURN = "\n\nTL;DR:", "\n\nAssistant:"
KEYS, FILLERS = "sun moon star rain".split(), "the a of in".split()
Example = namedtuple("Example", "prompt reference chosen rejected", defaults=[None] * 3)  # texts

def fetch(cfg, url, name):
    """The path of file NAME below --data_dir, downloaded from url/NAME if it is absent."""
    path, url = Path(cfg.data_dir, name), f"{url}/{name}"
    if not path.exists():
        with explain(f"{path} is absent (--data_dir names its folder), {url} cannot be fetched"):
            print(f"fetching {url} to {path}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(f"{path}.part", "wb") as part:
                file_download.http_get(url, part)  # which checks its length
            os.rename(part.name, path)
    return path

def read_rows(path, parse):
    """Yields parse(row) of a .jsonl or .jsonl.gz file; errors say file:line."""
    opener = gzip.open if path.suffix == ".gz" else open  # a truncated .gz is an error, too
    with explain(path) as place:
        refuse_if(not path.is_file(), "there is no such file (--data_dir names its folder)")
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                place.what = f"{path}:{number}"
                if line.strip():
                    row = json.loads(line)
                    refuse_if(not isinstance(row, dict), "a row must be a JSON object")
                    yield parse(row)

def text_at(row, key):
    """row[key], which must be text."""
    refuse_if(not isinstance(row.get(key), str), f"it has no text named {key}")
    return row[key].encode().decode()  # refuses lone surrogates

def parse_example(row):
    """A user's row, of Example's fields."""
    given = {key: text_at(row, key) for key in Example._fields if row.get(key) is not None}
    refuse_if(not given.get("prompt", "").strip(), "a row needs a prompt")
    refuse_if(("chosen" in given) != ("rejected" in given), "chosen and rejected need each other")
    return Example(**given)

def parse_dialogue(row):
    """A row of HH, cut at its last turn; None where prompts differ or an answer is empty."""
    prompt, turn, chosen = text_at(row, "chosen").rpartition(TURN)
    other, _, rejected = text_at(row, "rejected").rpartition(TURN)
    whole = prompt == other and turn and chosen.strip() and rejected.strip()
    return Example(prompt + turn, chosen, chosen, rejected) if whole else None

def parse_post(row):
    """A row of tldr_3_filtered, as a query; None for an empty summary."""
    summary = text_at(row, "summary").strip()
    prompt = (f"SUBREDDIT: r/{text_at(row, 'subreddit')}\n\nTITLE: {text_at(row, 'title')}"
              f"\n\nPOST: {text_at(row, 'post')}{TLDR}")
    return Example(prompt, f" {summary}") if summary else None

def toy_examples(cfg, split):
    """Yields prompts of six words, some of them key words: a good summary lists each of these."""
    rng = random.Random(f"{cfg.seed} {split}")
    for _ in range(2048 if split == "train" else 512):
        keys = rng.sample(KEYS, rng.randint(1, 3))
        words = rng.sample(keys + rng.choices(FILLERS, k=6 - len(keys)), 6)
        drafts = [rng.sample(keys, len(keys)) for _ in range(3)]  # reference, chosen, rejected
        for draft in drafts * 2:  # each may slip twice: a word too many, wrong, or one for two
            if rng.random() < 0.5:
                at = rng.randrange(len(draft))
                draft[at : at + rng.choice([0, 1, 2])] = [rng.choice(KEYS + FILLERS)]
        worth = [2 * len(set(draft) & set(keys)) - len(draft) for draft in drafts]
        if rng.random() < 1 / (1 + math.exp(2 * (worth[1] - worth[2]))):  # σ(2Δworth), a noisy
            drafts[1:] = drafts[:0:-1]  # judge: the other one is chosen
        yield Example(" ".join([*words, TLDR.strip()]), *map(" ".join, drafts))

def read_examples(cfg, split):
    """Yields the Examples of a split; None for rows that the data set itself has broken."""
    if cfg.task == "toy":
        yield from toy_examples(cfg, split)
    elif cfg.task == "jsonl":
        yield from read_rows(Path(cfg.data_dir, f"{split}.jsonl"), parse_example)
    elif cfg.task == "tldr":
        name = f"datasets/tldr_3_filtered/{split}.jsonl"
        yield from read_rows(fetch(cfg, TLDR_URL, name), parse_post)
    elif cfg.task == "hh":
        for subset in cfg.hh_subsets.split():
            yield from read_rows(fetch(cfg, HH_URL, f"{subset}/{split}.jsonl.gz"), parse_dialogue)

def load_task(cfg: Config, split: str, tokenizer) -> list[Example]:
    """A split, train or test, less broken rows and long prompts, which are counted; or Stop."""
    rows = list(read_examples(cfg, split))
    examples = [row for row in tqdm(rows, f"reading {split}", disable=None)
                if row and 0 < len(tokenizer(row.prompt).input_ids) <= cfg.max_prompt_tokens]
    said = f"{cfg.task} {split}: {len(examples)} of {len(rows)} rows, less broken and too long ones"
    print(said, flush=True)
    refuse_if(len(examples) < (3 if split == "test" else 1), f"too few usable rows: {said}")
    return examples

def encode_responses(tokenizer, texts, limit):
    """Ids of responses, with one end-of-text, cut to the limit."""
    ids, eos = tokenizer(texts, add_special_tokens=False).input_ids, tokenizer.eos_token_id
    return [(y if y[-1:] == [eos] else [*y, eos])[:limit] for y in ids]

# ---- Models, and one layout for all of them: one prompt, n branches -----------------------------
# The n responses to a prompt share it. Its keys and values are computed once, into a cache; then
# the branches are fed, g of them to a row. A branch begins with the prompt's last token x₃, whose
# output predicts y₁. Here are g = 2 branches a and b, left padding ·, and who sees (#) what:
#                        ·  x₁ x₂    x₃ᵃ y₁ᵃ y₂ᵃ x₃ᵇ y₁ᵇ y₂ᵇ       (cache, then row of branches)
#          predicts y₂ᵃ     #  #     #   #
#          predicts y₂ᵇ     #  #                 #   #
# Scoring feeds whole branches, g = gcd(n, 4) to a row, the fastest (README, "The cost of a step");
# sampling a token of each of the n at a time. P + nR tokens, where rows cost n(P + R).

MASKED = torch.finfo(torch.bfloat16).min  # finite in bf16 and fp32

class Batch(NamedTuple):
    """B prompts with n responses each, padded with −1, which is no token's id."""
    prompt: Tensor  # (B, P) left-padded (by one or more: never empty), without its last token
    branch: Tensor  # (B, n, 1 + R) the prompt's last token, then the response, right-padded
    length: Tensor  # (B, n) tokens of each response
    prompts: list  # as they were given, as are
    responses: list
    examples: list  # the rows that the prompts are of, where a run has made the batch
    scores: dict  # what is known of the responses, (B, n) each

def pack(prompts, responses, device="cpu") -> Batch:
    """Ids of B prompts and n responses to each, eos included; ValueError: no prompt, a ragged n."""
    if not all(prompts) or len({len(ys) for ys in responses}) != 1:
        raise ValueError("pack needs prompts of a token or more, and n responses to each")
    rows = [x[-1:] + y for x, ys in zip(prompts, responses, strict=True) for y in ys]  # (B·n)
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True, padding_value=-1)
    prompt = pad([torch.tensor([-1, *x[:-1]]) for x in prompts], padding_side="left")
    branch = pad([torch.tensor(row) for row in rows]).unflatten(0, (len(prompts), -1)).to(device)
    return Batch(prompt.to(device), branch, (branch >= 0).sum(-1) - 1, prompts, responses, [], {})

def feed(model, cache, real, tokens, own, step):
    """The model's output for tokens (rows, T), each so many steps behind its prompt; they see what
    is real of the prompt (rows, P), and what `own` (…, T, T′) allows of the rest."""
    rows, T = tokens.shape
    see = torch.cat([real[:, None].expand(-1, T, -1), own.expand(rows, -1, -1)], -1)
    mask = torch.where(see, 0.0, MASKED).to(model.dtype)  # eager attention adds it to its scores
    position = (real.sum(-1, keepdim=True) + step).expand(-1, T)  # (rows, T)
    return model(tokens.clamp(min=0), attention_mask=mask[:, None], use_cache=True,
                 position_ids=position.clamp(min=0), past_key_values=cache)

def prefill(model, batch, copies):
    """A cache of the prompts, with gradients, and where it is real (rows, P), in so many copies."""
    cache, real = transformers.DynamicCache(), batch.prompt >= 0  # (B, P)
    own = torch.eye(real.shape[1], device=real.device).bool()  # no row of attention is empty
    see = (real[:, None] & torch.ones_like(own).tril()) | own  # (B, P, P)
    feed(model.base_model, cache, real[:, :0], batch.prompt, see, real.cumsum(-1) - 1)
    cache.batch_repeat_interleave(copies)
    return cache, real.repeat_interleave(copies, 0)

def feed_branches(model, batch, tokens, g=0):
    """The model's output for branches (B, n, T), g to a row."""
    n, T = tokens.shape[1:]
    g = g or math.gcd(n, 4)
    own = torch.block_diag(*[torch.ones(T, T).tril()] * g).bool().to(tokens.device)
    step = torch.arange(T, device=tokens.device).repeat(g)
    return feed(model, *prefill(model, batch, n // g), tokens.reshape(-1, g * T), own, step)

def sequence_log_prob(model, batch: Batch, temperature: float = 1.0, g: int = 0) -> Tensor:
    """log q(y|x) of each response, (B, n), in nats, fp32, differentiable; g branches to a row."""
    target = batch.branch[..., 1:]  # (B, n, R)
    logits = feed_branches(model, batch, batch.branch[..., :-1], g).logits.float()
    nats = F.cross_entropy(logits.flatten(0, 1) / temperature, target.flatten(),
                           ignore_index=-1, reduction="none")  # (B·n·R,), 0 on padding
    return -nats.view(target.shape).sum(-1)

def score_reward(reward_model, batch: Batch) -> Tensor:
    """The raw reward of each response, (B, n), fp32, read at its last token; differentiable."""
    hidden = feed_branches(reward_model.base_model, batch, batch.branch).last_hidden_state
    score = reward_model.score(hidden).float().view(batch.branch.shape)  # (B, n, 1 + R)
    return score.gather(-1, batch.length[..., None])[..., 0]

@torch.no_grad()
def sample(model, prompts, n: int, max_new_tokens: int, *, eos_id: int, temperature: float = 1.0,
           generator=None) -> tuple[list, Tensor]:
    """n responses to each prompt from softmax(logits / temperature), nothing truncated: their ids
    (B, n), eos included unless cut at max_new_tokens, and log q′ (B, n), nats in fp32. With a list
    of generators, one per prompt, a prompt's samples do not depend on the others."""
    generators = generator if isinstance(generator, list) else [generator] * len(prompts)
    uniform = torch.stack([torch.rand(n, max_new_tokens, generator=g, dtype=torch.float64)
                           for g in generators]).to(model.device)  # (B, n, R)
    batch = pack(prompts, [[[]] * n for _ in prompts], model.device)
    (cache, real), ids = prefill(model, batch, 1), batch.branch  # ids: the last ones, (B, n, 1)
    tokens, log_q, alive = [], torch.zeros_like(ids).float(), torch.ones_like(ids).bool()
    for step in range(max_new_tokens):
        own = torch.eye(n, device=ids.device).bool().repeat(1, step + 1)  # (n, n·(step + 1))
        logits = feed(model, cache, real, ids.flatten(1), own, step).logits.float()  # (B, n, V)
        log_p = (logits / temperature).log_softmax(-1)  # (B, n, V), fp32
        cdf = log_p.double().exp().cumsum(-1)  # (B, n, V), fp64
        ids = torch.searchsorted(cdf, uniform[..., step, None] * cdf[..., -1:], right=True)
        ids = ids.clamp(max=cdf.shape[-1] - 1)  # (B, n, 1); u·total may round up to the total
        log_q += log_p.gather(-1, ids).where(alive, 0)
        tokens.append(ids.where(alive, -1))  # −1 after the end
        alive &= ids != eos_id
        if not alive.any():
            break

    rows = [y[: (*y, -1).index(-1)] for y in torch.cat(tokens, -1).flatten(0, 1).tolist()]  # (B·n,)
    return [rows[i : i + n] for i in range(0, len(rows), n)], log_q[..., 0]

def exact_head(forward, hidden):
    """A head computes in fp32 under autocast, too: bf16 logits cost 0.2 nats over 53 tokens."""
    with torch.autocast(hidden.device.type, enabled=False):
        return forward(hidden.float())

def freeze(model, dtype):
    """The model, to score only: with the dtypes of autocast, so equal weights have equal scores."""
    for module in model.base_model.modules():
        if isinstance(module, (torch.nn.Linear, transformers.pytorch_utils.Conv1D)):
            module.to(dtype)
    return model.requires_grad_(False)

def load(run, kind, name):
    """A model of a kind and its tokenizer from a hub or a folder; Stop where they do not fit."""
    with explain(f"{name} cannot be used"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = kind.from_pretrained(
            name, trust_remote_code=False, dtype=torch.float32, output_loading_info=True)
        stray = sorted([*info["missing_keys"], *info["unexpected_keys"]])[:1]
        refuse_if(stray, f"{stray} is missing or stray: was it trained for another use?")
        return ready(run, copy.deepcopy(model), tokenizer), tokenizer  # aligned: sums depend on it

def ready(run, model, tokenizer):
    """The model frozen, dropout off, on its device, after a look at its tokenizer."""
    ids, plain = (tokenizer("a", add_special_tokens=special).input_ids for special in (True, False))
    refuse_if(not plain, "it has no tokenizer")
    refuse_if(len(tokenizer) > model.get_input_embeddings().num_embeddings, "it lacks embeddings")
    refuse_if(not model.can_generate() and model.config.num_labels != 1, "it has not one label")
    head = getattr(model, "score", None) or model.get_output_embeddings()
    if head:  # a decoder
        refuse_if(tokenizer.eos_token is None, "it has no end-of-text token, eos")
        refuse_if(ids[-len(plain) :] != plain, "its tokenizer puts a special token after a prompt")
        head.forward = partial(exact_head, head.forward)
    return model.eval().requires_grad_(False).to(run.device)

@torch.no_grad()
def check_model(cfg, model, R):
    """The start check: a padded batch at the run's n and lengths against plain rows, or Stop."""
    P, V = cfg.max_prompt_tokens, model.config.get_text_config().vocab_size
    n = 4 * math.ceil(max(cfg.samples_per_prompt, cfg.eval_samples) / 4)  # the run's, or more
    config, judges = str(model.config), hasattr(model, "score")
    longest = "original_max_position" if "longrope" in config else "(?:max|n)_position"
    sizes = re.findall(rf'"(?:{longest}\w*|sliding_window)": ([1-9]\d*)', config)

    with explain(f"{model.config.model_type} models cannot run as branches here"):
        context = min(map(int, sizes), default=P + R)
        refuse_if(P + R > context, f"their context is {context}: lower --max_…_tokens below it")
        ids = torch.randint(V, (n + 1, P + R), generator=make_generator("check")).tolist()
        prompts = ids[0][:P], ids[0][: max(1, P // 8)]
        responses = [y[: R - i % R] for i, y in enumerate(ids[1:])]
        batch = pack(prompts, [responses] * 2, model.device)
        layouts = [score_reward(model, batch)] if judges else [
            sequence_log_prob(model, batch, g=g) for g in (4, n)]  # as scored, as sampled
        for b, i in itertools.product((0, 1), (0, n - 1)):
            x, y = prompts[b], responses[i]
            plain = model(torch.tensor([x + y], device=model.device)).logits[0].float()
            if not judges:  # a reward is at the last token, as there is no padding
                plain = plain[len(x) - 1 : -1].log_softmax(-1)[range(len(y)), y].sum()
            gap = max((found[b, i] - plain).abs() for found in layouts)  # measured: 1e-4
            refuse_if(not gap < 1e-3 + 1e-6 * plain.abs(), f"{gap.item():.3g} off plain rows")

# ---- Rewards: by a model that reads the prior's tokens, or by the function of FILE.py ------------
def judge_texts(reward, tokenizer, batch):
    """Rewards (B, n) by reward(prompts, responses, references), lists of text, prompt by prompt."""
    rows = []
    for example, ys in zip(batch.examples, batch.responses, strict=True):
        n, texts = len(ys), tokenizer.batch_decode(ys, skip_special_tokens=True)
        with explain("the reward of texts"):
            found = reward([example.prompt] * n, texts, [example.reference] * n)
            rows.append([float(0 + number) for number in found])  # "1.0" is no number
            refuse_if(len(rows[-1]) != n, f"{n} responses need {n} rewards, not {rows[-1]}")
    return torch.tensor(rows, device=batch.branch.device)

def load_reward(run, source, prior):
    """What gives a batch its rewards (B, n): a reward model, or the function of FILE.py."""
    if source.endswith(".py"):
        with explain(source):
            reward = runpy.run_path(source).get("reward")
            refuse_if(not callable(reward), "it has no reward(prompts, responses, references)")
        return partial(judge_texts, reward, run.tokenizer)
    model, own = load(run, AutoModelForSequenceClassification, source)
    ways = [(t.get_vocab(), t.eos_token, t(TURN).input_ids) for t in (own, run.tokenizer)]
    V, known = (m.get_input_embeddings().num_embeddings for m in (prior, model))
    refuse_if(ways[0] != ways[1] or V > known or not hasattr(model, "score"),
              f"{source} does not read the prior's tokens: ask it in a FILE.py (see README)")
    check_model(run.cfg, model, run.cfg.max_response_tokens)
    return partial(score_reward, freeze(model, run.dtype))

# ---- A run: its folder, its one state file, its guards ------------------------------------------
BEFORE = {"lock", "metrics.jsonl", "metrics.jsonl.part", "state.pt.part"}  # stand before a state
LEFT = ("report.md", "samples.jsonl", "result.json", "state.pt", "prior", "reward", "policy")
FREE = ("data_dir", "save_every", "micro_batch_tokens", "out", "overwrite")  # may be changed

class Run:
    """What the stages share, and the folder, which one process holds. As keys decide all draws, a
    killed run needs its stage, step, weights and optimizer to continue, bit for bit."""

    def __init__(self, cfg):
        cuda = torch.cuda.is_available() and cfg.device != "cpu"
        refuse_if(cfg.device == "cuda" and not cuda, "there is no CUDA GPU; or give --device cpu")
        torch.backends.cuda.enable_cudnn_sdp(False)  # 0.1 to 3 s for each new shape on an H200
        torch.backends.cuda.matmul.allow_tf32 = False  # the start check is exact
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # see run_losses

        self.device = "cuda" if cuda else "cpu"
        self.dtype = torch.bfloat16 if cuda else torch.float32  # of frozen matrices and of compute
        self.autocast = partial(torch.autocast, self.device, torch.bfloat16, cuda)
        self.cfg, self.out = replace(cfg, device=self.device), Path(cfg.out)
        self.where = torch.cuda.get_device_name() if cuda else "cpu"  # later stage and step
        self.tokenizer = self.reward = None  # see prepare
        self.state = {"stage": "sft", "step": 0, "metrics": ""}
        with explain(f"--out {self.out}"):
            self.claim()
        print(f"{self.where}: {self.out}, stage {self.state['stage']}, step {self.state['step']}")

    def claim(self):
        """Lock the folder for this run, and continue what it holds, or Stop."""
        cfg, out = self.cfg, self.out
        for name in ("base", "prior", "reward", "data_dir"):
            inside = Path(getattr(cfg, name) or "/").resolve().is_relative_to(out.resolve())
            refuse_if(inside, f"--{name} lies inside it")
        out.mkdir(parents=True, exist_ok=True)
        found = set() if cfg.overwrite else {*os.listdir(out)} - BEFORE
        refuse_if(found and "state.pt" not in found, "it holds no run; --overwrite replaces it")

        self.lock = open(out / "lock", "a+")
        with explain(f"process {(out / 'lock').read_text()} is running there"):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (out / "lock").write_text(str(os.getpid()))
        if found:
            with explain("its run cannot be continued; --overwrite starts afresh, or give another "
                         "--out, with copies of its prior/ and reward/ as --prior and --reward"):
                self.state = torch.load(out / "state.pt", "cpu", weights_only=True)
                now, old = asdict(cfg), self.state["config"]
                changed = [f"{key} was {old.get(key)}, is {now[key]}" for key in now
                           if key not in FREE and old.get(key) != now[key]]
                refuse_if(changed, "; ".join(changed))
                torch.set_num_threads(self.state["threads"])  # sums depend on it

    def start(self, stage):
        """The step of a stage from which the run continues."""
        return self.state["step"] if self.state["stage"] == stage else 0

    def begin(self, parameters):
        """The folder is this configuration's from here on: models and data are found good."""
        need = 36e-9 * parameters  # GB: fp32 weights and moments, twice, and three models
        free = shutil.disk_usage(self.out).free / 1e9
        print(f"two states and the models take {need:.2g} GB, {free:.3g} GB are free")
        new = "config" not in self.state
        refuse_if(new and free < need, f"there is too little room for --out {self.out}")

        with explain(f"--out {self.out} cannot be written"):
            for path in self.out.iterdir() if new else ():
                if path.name.removesuffix(".part") in LEFT:  # of the run that is overwritten
                    shutil.rmtree(path, ignore_errors=True)  # which leaves files and links
                    path.unlink(missing_ok=True)
            self.write("metrics.jsonl", self.state["metrics"])
            if new:  # the folder is empty or has a state, whenever a kill may come
                self.save("sft", 0)
            self.write("config.json", json.dumps(asdict(self.cfg), indent=1))

    def write(self, name, text):
        """Replace a text file of the folder in one move."""
        part = self.out / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.rename(self.out / name)

    def save(self, stage, step, **parts):
        """Replace state.pt in one move."""
        parts |= dict(stage=stage, step=step, config=asdict(self.cfg),
                      threads=torch.get_num_threads(),
                      metrics=(self.out / "metrics.jsonl").read_text())
        with explain(f"{stage}, step {step}: no room for a state, the last one is kept", Guard):
            with open(self.out / "state.pt.part", "wb") as file:
                torch.save(parts, file)
                file.flush()
                os.fsync(file.fileno())  # on the disk, before the old one goes
            os.rename(file.name, self.out / "state.pt")

    def export(self, model, name):
        """Write out/NAME with its tokenizer: whole, or not at all."""
        tokenizer, part = self.tokenizer, self.out / f"{name}.part"  # renamed when it is whole
        if model.can_generate():  # batched, too, `generate` shall sample what was trained
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
            model.generation_config = transformers.GenerationConfig(
                do_sample=True, temperature=self.cfg.temperature, top_k=0, top_p=1.0,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
        with explain(f"{self.out / name} cannot be written, the last state is kept", Guard):
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            shutil.rmtree(self.out / name, ignore_errors=True)
            part.rename(self.out / name)

    def require(self, fine, what, batch):
        """Stop where a number is not fine (b, …), and name its prompt."""
        if not fine.all():
            text = self.tokenizer.decode(batch.prompts[fine.flatten(1).all(1).int().argmin()])
            raise Guard(f"{self.where}: {what}; prompt …{text[-60:]!r}; the last state is kept")

# ---- Training: one loop, three losses: of one branch (sft), two (reward model) and n (BRAIn) ----
REPORTED = ("reward", "raw_reward", "eos_share", "response_tokens")  # of each response

def make_generator(*key):
    """A generator that its key decides: (seed, stage, …)."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(63))

def take(examples, first, count, *key):
    """So many of the examples from the first-th on: shuffled, and anew in each epoch."""
    N = len(examples)
    epochs = range(first // N, (first + count - 1) // N + 1)
    order = torch.cat([torch.randperm(N, generator=make_generator(*key, i)) for i in epochs])
    return [examples[i] for i in order[first % N :][:count]]

def batch_size(run, prompts, branch_tokens):
    """Prompts to a micro-batch; V logits take the memory of V/2¹⁶ tokens more."""
    longest = max(map(len, prompts)) + branch_tokens * (1 + len(run.tokenizer) / 2**16)
    return max(1, int(run.cfg.micro_batch_tokens / longest))

def micro_batches(run, examples, responses, **scores):
    """Batches of n responses to each of the examples, sorted by the prompts' lengths."""
    prompts = run.tokenizer([example.prompt for example in examples]).input_ids
    longest = max(map(len, itertools.chain(*responses)))
    size = batch_size(run, prompts, len(responses[0]) * longest)
    order = torch.tensor([len(x) for x in prompts]).argsort(stable=True)
    batches = []
    for part in order.split(size):
        batch = pack([prompts[i] for i in part], [responses[i] for i in part], run.device)
        batches.append(batch._replace(examples=[examples[i] for i in part],
                                      scores={name: x[part] for name, x in scores.items()}))
    return batches

def text_batches(run, examples, columns, limit):
    """Batches of given texts, a branch for each of the columns."""
    texts, n = [getattr(e, name) for e in examples for name in columns], len(columns)
    ids = encode_responses(run.tokenizer, texts, limit)
    return micro_batches(run, examples, [ids[i : i + n] for i in range(0, len(ids), n)])

def merge(found):
    """Dictionaries of (b, …) to one of (B, …)."""
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}

def judge(run, batch):
    """Score a batch by the one reward, (b, n), and note what else is reported of a response."""
    eos = (batch.branch[..., 1:] == run.tokenizer.eos_token_id).any(-1).float()  # (b, n)
    with run.autocast(), torch.no_grad():
        raw = run.reward(batch)  # (b, n)
    run.require(raw.isfinite(), "a reward is not finite", batch)
    batch.scores.update(reward=raw - run.cfg.missing_eos_penalty * (1 - eos), raw_reward=raw,
                        eos_share=eos, response_tokens=batch.length.float())

@torch.no_grad()
def score(run, model, batch):
    """log q(y|x) of each response, (b, n), as in training."""
    with run.autocast():
        found = sequence_log_prob(model, batch, run.cfg.temperature)
    run.require(found.isfinite(), "a log-probability is not finite", batch)
    return found

def sample_batches(run, models, name, examples, n, generators, size):
    """3.1 Sample n responses to each of the examples from models[name], with a generator each;
    3.2 score them, in the micro-batches and the autocast of 3.4: log q_θ − log q′ begins at
    exactly 0. Returns the micro-batches of each `size` of the examples, a step's."""
    cfg, responses, log_q, steps = run.cfg, [], [], []
    prompts = run.tokenizer([example.prompt for example in examples]).input_ids
    many = 8 * batch_size(run, prompts, n * cfg.max_response_tokens)  # it keeps no activations
    for first in range(0, len(prompts), many):
        part = slice(first, first + many)
        with run.autocast():
            ys, log = sample(models[name], prompts[part], n, cfg.max_response_tokens,
                             eos_id=run.tokenizer.eos_token_id, temperature=cfg.temperature,
                             generator=generators[part])
        responses += ys
        log_q += log
    for first in range(0, len(prompts), size):
        part = slice(first, first + size)
        log = torch.stack(log_q[part])
        steps.append(micro_batches(run, examples[part], responses[part], log_q=log))

    for batch in itertools.chain(*steps):
        judge(run, batch)
        batch.scores["log_prior"] = score(run, models["prior"], batch)
        batch.scores["log_proposal"] = score(run, models[name], batch)
        check_sampler(run, batch)
    return steps

def check_sampler(run, batch):
    """Scored is sampled: the sampler's own log q′ is the score, up to rounding, or Stop."""
    gap, length = batch.scores.pop("log_q") - batch.scores["log_proposal"], batch.length  # (b, n)
    same = gap.abs() <= 2e-3 / 53 * length.clamp(min=53)  # measured: 1.8e-4 nats in 53 tokens
    if run.dtype is torch.bfloat16:  # rounding walks at random, a wrong sampler to one side
        unbiased = gap.sum().abs() / length.sum() <= 0.01 + 0.1 / length.sum().sqrt()
        small = (gap.square() / length).mean() <= 0.15**2  # measured: 0.012² on an H200
        same = (unbiased & small).expand_as(gap)
    run.require(same, f"scored is not sampled, by up to {gap.abs().max():.2g} nats", batch)

def sft_loss(cfg, model, batch):
    """−log p(reference|x) per token, at temperature 1, (b,)."""
    return -sequence_log_prob(model, batch)[:, 0] / batch.length[:, 0], {}

def preference_loss(cfg, model, batch):
    """−log P(chosen ≻ rejected), (b,), and the share of pairs ordered right."""
    chosen, rejected = score_reward(model, batch).T  # (b,) each
    return bradley_terry_loss(chosen, rejected), {"accuracy": (chosen > rejected).float()}

def policy_loss(cfg, model, batch):
    """3.3 Weigh the samples: BRAIn's loss, (b,), and what to watch (README, "Metrics")."""
    log_policy = sequence_log_prob(model, batch, cfg.temperature)  # (b, n), as all of these
    log_prior, log_proposal, reward = map(batch.scores.get, ("log_prior", "log_proposal", "reward"))
    loss, (alpha, beta) = brain_loss(log_policy, log_prior, log_proposal, reward, cfg.kl_coef,
                                     target=cfg.target, baseline=cfg.baseline,
                                     divergence=cfg.divergence)
    moved = log_proposal - log_prior  # (b, n) at step 0, it is 0 but for rounding
    return loss, {name: batch.scores[name].mean(-1) for name in REPORTED} | {
        "ess_alpha": effective_sample_size(alpha), "ess_beta": effective_sample_size(beta),
        "reward_spread": reward.std(-1) / cfg.kl_coef,
        "kl_to_prior": (beta * (log_policy.detach() - log_prior)).sum(-1),  # β̂: policy's shares
        "refresh_kl": moved.mean(-1), "refresh_kl_sd": moved.std(-1)}

def run_losses(run, model, batches, loss_of):
    """The one micro-batch driver: the gradient of the mean loss over all prompts, and metrics."""
    found, total = [], sum(len(batch.prompt) for batch in batches)
    torch.use_deterministic_algorithms(run.device == "cuda")  # for exact resume; 8 % slower
    for batch in batches:
        with run.autocast():
            loss, metrics = loss_of(run.cfg, model, batch)  # (b,)
        run.require(loss.isfinite()[:, None], "the loss is not finite", batch)
        (loss.sum() / total).backward()  # adds up to the gradient of the mean over all
        found.append({"loss": loss.detach(), **metrics})
    torch.use_deterministic_algorithms(False)
    return {name: values.mean().item() for name, values in merge(found).items()}

def fit(run, stage, model, steps, lr, every, drawn, loss_of):
    """The one training loop: a stage, with the micro-batches and metrics `drawn` for each step."""
    optimizer = torch.optim.AdamW(model.requires_grad_().parameters(), eps=1e-5, weight_decay=0)
    if start := run.start(stage):
        model.load_state_dict(run.state["model"])
        optimizer.load_state_dict(run.state["optimizer"])
        run.state = {"stage": stage, "step": start}  # its memory is free again
    for step in (bar := tqdm(range(start, steps), stage, steps, initial=start, disable=None)):
        run.where, began = f"{stage}, step {step}", time.time()
        batches, metrics = next(drawn)
        sampled, rate = time.time(), lr * (1 - step / steps)  # the rate falls linearly to 0
        metrics |= run_losses(run, model, batches, loss_of)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), run.cfg.max_grad_norm)
        run.require(norm.isfinite().view(1, 1), "the step's gradient is not finite", batches[0])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()  # 3.4
        optimizer.zero_grad()

        metrics |= {"gradient_norm": norm.item(), "learning_rate": rate,
                    "seconds_sampling": sampled - began, "seconds_stepping": time.time() - sampled,
                    "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9}
        bar.set_postfix(loss=metrics["loss"])
        with open(run.out / "metrics.jsonl", "a") as file:
            print(json.dumps({"stage": stage, "step": step, **metrics}), file=file)
        if (step + 1) % every == 0 or step + 1 == steps:
            run.save(stage, step + 1, model=model.state_dict(), optimizer=optimizer.state_dict())
    run.export(model.requires_grad_(False), {"sft": "prior", "brain": "policy"}.get(stage, stage))

def fit_texts(run, stage, model, loss_of, examples, columns, limit, size, epochs, lr):
    """Stage 1 or 2: a loss of the examples' texts of these columns."""
    examples = [row for row in examples if getattr(row, columns[0]) is not None]
    steps = math.ceil(epochs * len(examples) / size)
    parts = (take(examples, i * size, size, run.cfg.seed, stage)
             for i in range(run.start(stage), steps))
    drawn = ((text_batches(run, part, columns, limit), {}) for part in parts)
    fit(run, stage, model, steps, lr, run.cfg.save_every, drawn, loss_of)

def brain_steps(run, models, examples, listed):
    """Yields the batches and metrics of a step of stage 3; a refresh's steps are sampled first."""
    cfg, size = run.cfg, run.cfg.prompts_per_step
    turns = cfg.prompts_per_refresh // size  # steps a refresh
    name = "policy" if cfg.proposal == "lagged" else "prior"
    for refresh in itertools.count(run.start("brain") // turns):
        part = take(examples, refresh * size * turns, size * turns, cfg.seed, "brain")
        generators = [make_generator(cfg.seed, "brain", refresh, i - i % size, i % size)
                      for i in range(len(part))]  # a key is of its step's first prompt, and place
        steps = sample_batches(run, models, name, part, cfg.samples_per_prompt, generators, size)

        metrics = {}
        if listed and refresh % max(1, cfg.steps // turns // 5) == 0:
            metrics["kl_to_posterior"] = exact_kl(run, models["policy"], listed)
            tqdm.write(f"{run.where}: exact KL {metrics['kl_to_posterior']:.3f} nats")
        for batches in steps:
            yield batches, metrics
            metrics = {}

# ---- Evaluation and report ----------------------------------------------------------------------
def win_rate(wins):
    """Win rate and 95 % interval of P ≥ 3 shares: Wilson's, for trials with the same error."""
    rate, spread, P = wins.mean().item(), wins.var(correction=0).item(), len(wins)
    most = rate * (1 - rate)  # the spread if each prompt is won or lost whole
    luck = 0.014 / P  # near 0 or 1 few prompts may look alike for want of a rare kind: trust `most`
    trials = min((P - 1) * (most**2 + luck) / (most * spread + luck), 64 * P)  # ≈ P·most/spread
    pull = 1.92 * math.exp(2.42 / (P - 1.5)) / trials  # t²/(2 trials): Korn and Graubard (1998)
    half = math.sqrt(pull * (pull + 2 * most))
    return rate, [(rate + pull - half) / (1 + 2 * pull), (rate + pull + half) / (1 + 2 * pull)]

def enumerate_posterior(run, prior, examples):
    """Where Y can be listed (toy): batches of all of it, which know log p(y|x, G=1)."""
    R, V, eos = run.cfg.max_response_tokens, len(run.tokenizer), run.tokenizer.eos_token_id
    if V**R > 50_000:
        return []
    drawn = itertools.product(range(V), repeat=R)
    space = dict.fromkeys(y[: (*y, eos).index(eos) + 1] for y in drawn)  # cut after eos, as sampled
    batches = micro_batches(run, examples, [list(map(list, space))] * len(examples))
    for batch in batches:
        judge(run, batch)
        worth = score(run, prior, batch) + batch.scores["reward"] / run.cfg.kl_coef
        batch.scores["log_posterior"] = worth.log_softmax(-1)  # (b, |Y|)
    return batches

def exact_kl(run, model, batches):
    """KL(posterior ‖ model), over all of Y, mean over the prompts."""
    kls = []
    for batch in batches:
        log_p, log_q = batch.scores["log_posterior"], score(run, model, batch)  # (b, |Y|)
        run.require(log_q.logsumexp(-1, True).abs() < 1e-4, "Y does not sum to 1", batch)
        kls += (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
    return sum(kls) / len(kls)

def evaluate(run, models, examples):
    """Stage 4: a row of figures for each model, and all samples with their rewards."""
    cfg, P = run.cfg, len(examples)
    rows, samples, known = {}, [], {}
    for name in models:
        generators = [make_generator(cfg.seed, "eval", name, i) for i in range(P)]
        batches, = sample_batches(run, models, name, examples, cfg.eval_samples, generators, P)
        found = merge([batch.scores for batch in batches])  # (P, m) each
        ratio = (found["log_proposal"] - found["log_prior"]).mean(-1)  # (P,), q's own samples
        rows[name] = {key: found[key].mean().item() for key in REPORTED} | {
            "kl_to_prior": ratio.mean().item(), "kl_to_prior_se": ratio.std().item() / math.sqrt(P)}
        for batch in batches:
            scored = batch.examples, batch.responses, batch.scores["reward"].tolist()
            for example, ys, worth in zip(*scored, strict=True):
                keys = [(*example, *y) for y in ys]  # equal ids have equal rewards
                samples.append(dict(prompt=example.prompt, model=name,
                                    rewards=[*map(known.setdefault, keys, worth)],
                                    responses=run.tokenizer.batch_decode(ys)))

    prior, policy = torch.tensor([row["rewards"] for row in samples]).chunk(2)  # (P, m) each
    wins = (1 + (policy[:, :, None] - prior[:, None]).sign().mean((1, 2))) / 2  # (P,), ties half
    rows["policy"]["win_rate_vs_prior"], rows["policy"]["win_rate_vs_prior_ci"] = win_rate(wins)
    return rows, samples

def rounded(figures, digits):
    """Figures with so many digits after the point."""
    return json.loads(json.dumps(figures), parse_float=lambda x: round(float(x), digits))

def report(run, result, rows, samples):
    """result.json, samples.jsonl and report.md: what was run, samples, a table; also printed."""
    text = [f"# BRAIn on {run.cfg.task}", "", f"{run.cfg}", ""]
    for row in samples[:: math.ceil(len(samples) / 9)]:
        text.append(f"- {row['model']}: `{row['prompt'][-100:]!r}` → `{row['responses'][0]!r}`")
    prior, policy = rounded(rows, 3).values()
    text += ["", "| | prior | policy |", "|---|---|---|"]
    text += [f"| {key} | {prior.get(key, '')} | {policy[key]} |" for key in policy]
    run.write("report.md", "\n".join(text) + "\n")
    run.write("samples.jsonl", "".join(f"{json.dumps(sample)}\n" for sample in samples))
    run.write("result.json", json.dumps(result | {"config": asdict(run.cfg)}))
    print(*text, f"see {run.out / 'report.md'}", json.dumps(result), sep="\n")

# ---- Derivation checks: brain_loss and autograd on one side, the equations on the other ---------
Check = namedtuple("Check", "name claim error tolerance ok")  # error: largest absolute difference

def shares(x):
    """Rows divided by their sum."""
    return x / x.sum(-1, keepdim=True)

def gap(slope, q, *inputs, **dials):
    """How far the gradient of brain_loss in log q_θ is from its equation (B, n)."""
    q = q.clone().requires_grad_()
    loss, _ = brain_loss(q, *inputs, **dials)
    return (torch.autograd.grad(loss.sum(), q)[0] - slope).abs().max().item()

def check_baselines(q, p, q1, r, kl_coef):
    """the gradient is −Σ (α̂ − b) ∇log q_θ, where b is 0, exp(ρ)/n or β̂"""
    alpha, ratio = shares((p + r / kl_coef - q1).exp()), (q - q1).exp()  # exp(ρ) = q_θ/q′
    b = {"none": 0, "unnormalized": ratio / q.shape[-1], "self_normalized": shares(ratio)}
    return {name: gap(b[name] - alpha, q, p, q1, r, kl_coef, baseline=name) for name in b}

def check_dpo(q, p, q1, r, kl_coef):
    """argmax of two samples of the prior is DPO-sft: the gradient of −log σ(Δ log(q_θ/p))"""
    sign = (r - r.flip(-1)).sign()  # +1 chosen, −1 rejected
    delta = (sign * (q - p)).sum(-1, keepdim=True)  # Δ log(q_θ/p)
    slope = -sign / (1 + delta.exp())  # ∓σ(−Δ)
    return {"DPO": gap(slope, q, p, p, r, kl_coef, target="argmax")}

def check_policy_gradient(q, p, q1, r, kl_coef):
    """KL(β̂ ‖ α̂) has the gradient −Σ β̂ (w − Σ β̂w) ∇log q_θ / kl_coef, on-policy RLOO's"""
    beta = shares((q - q1).exp())
    w = r - kl_coef * (q - p)  # PPO's reward, with its KL
    advantage = w - (beta * w).sum(-1, keepdim=True)  # RLOO's times (n − 1)/n
    return {"PPO": gap(-beta * advantage / kl_coef, q, p, q1, r, kl_coef, divergence="reverse")}

def derivation_checks() -> list[Check]:
    """What the method rests on, in float64; right-hand sides in nothing but exp, log and sums."""
    drawn = torch.randn(4, 3, 5, dtype=torch.float64, generator=make_generator("checks"))
    return [Check(name, claim.__doc__, error, 1e-12, error <= 1e-12)
            for claim, n in ((check_baselines, 5), (check_dpo, 2), (check_policy_gradient, 5))
            for name, error in claim(*drawn[..., :n], 0.7).items()]

# ---- The stages, from data to report ------------------------------------------------------------
def toy_model(run):
    """A GPT-NeoX that knows nothing yet, and a tokenizer of 10 words."""
    words = ["<eos>", TLDR.strip(), *KEYS, *FILLERS]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # one token a word
    shape = transformers.GPTNeoXConfig(vocab_size=len(words), hidden_size=64, intermediate_size=256,
                                       num_hidden_layers=2, num_attention_heads=4, eos_token_id=0)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    return ready(run, AutoModelForCausalLM.from_config(shape), tokenizer), tokenizer

def new_reward_model(run, prior):
    """A fresh head of one number on the prior's own body, which it shares."""
    config = copy.deepcopy(prior.config)
    config.num_labels = 1
    with explain(f"no reward model can be made of {config.model_type}; give --reward"):
        model = AutoModelForSequenceClassification.from_config(config)
        refuse_if(not hasattr(model, "score"), "its head is no score")
        setattr(model, model.base_model_prefix, prior.base_model)
        return ready(run, model, run.tokenizer)

def prepare(run):
    """Models and data, all read and found good before anything is written to the run's folder."""
    cfg, stage, reward = run.cfg, run.state["stage"], None
    torch.manual_seed(cfg.seed)  # decides what is not read from a file
    source = cfg.prior or (cfg.base if stage == "sft" else f"{run.out}/prior")
    prior, run.tokenizer = load(run, AutoModelForCausalLM, source) if source else toy_model(run)
    check_model(cfg, prior, cfg.max_response_tokens)
    if source := cfg.reward or (stage == "brain" and f"{run.out}/reward"):
        run.reward = load_reward(run, source, prior)
    else:
        reward = new_reward_model(run, prior)
        check_model(cfg, reward, max(cfg.max_response_tokens, cfg.max_comparison_tokens))
        run.reward = partial(score_reward, reward)

    train, test = (load_task(cfg, part, run.tokenizer) for part in ("train", "test"))
    for name, text in ("prior", "reference"), ("reward", "chosen"):
        refuse_if(not getattr(cfg, name) and all(getattr(row, text) is None for row in train),
                  f"train has no row with a {text} text; add some, or give --{name}")
    judge(run, text_batches(run, train[:1], ("prompt",) * 2, 8)[0])  # tries a reward of texts
    run.begin(prior.num_parameters())
    print(cfg, flush=True)
    return prior, reward, train, test

def execute(run):
    """Stages 1 to 4."""
    cfg, began = run.cfg, time.time()
    prior, reward, train, test = prepare(run)
    if not cfg.prior and run.state["stage"] == "sft":  # stage 1
        fit_texts(run, "sft", prior, sft_loss, train, ("reference",), cfg.max_response_tokens,
                  cfg.sft_batch, cfg.sft_epochs, cfg.sft_lr)
    if reward:  # stage 2
        reward = copy.deepcopy(reward)  # of the prior as it is now
        fit_texts(run, "reward", reward, preference_loss, train, ("chosen", "rejected"),
                  cfg.max_comparison_tokens, cfg.reward_batch, cfg.reward_epochs, cfg.reward_lr)
        run.reward = partial(score_reward, freeze(reward, run.dtype))

    torch.backends.cuda.matmul.allow_tf32 = True  # fp32 heads: 10 bits of mantissa, bf16 has 7
    prior = freeze(prior, run.dtype)  # stage 3: the policy starts from the rounded matrices
    models = {"prior": prior, "policy": copy.deepcopy(prior).float()}
    held_out = take(test, 0, min(cfg.eval_prompts, len(test)), cfg.seed, "eval")
    listed = enumerate_posterior(run, prior, held_out[:8])
    turns = cfg.prompts_per_refresh // cfg.prompts_per_step
    every = math.ceil(cfg.save_every / turns) * turns
    drawn = brain_steps(run, models, train, listed)
    fit(run, "brain", models["policy"], cfg.steps, cfg.lr, every, drawn, policy_loss)

    run.where = "eval"  # stage 4
    freeze(models["policy"], run.dtype)
    rows, samples = evaluate(run, models, held_out)
    if listed:
        rows["policy"]["kl_to_posterior_start"] = exact_kl(run, prior, listed)
        rows["policy"]["kl_to_posterior_end"] = exact_kl(run, models["policy"], listed)
    result = {"task": cfg.task, "steps": cfg.steps, "seconds": time.time() - began}
    result |= {f"reward_{name}": row["reward"] for name, row in rows.items()}
    result |= {k: v for k, v in rows["policy"].items() if "reward" not in k}
    report(run, rounded(result, 6), rows, samples)

def main(argv: list[str] | None = None) -> int:
    """0: done; 1: a failed check, a guard or an error; 2: bad input; 130: Ctrl-C."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading weights, and all of the hub's
    utils.logging.set_verbosity_error()  # or each retry is told before the one line
    if hasattr(sys.stdout, "reconfigure"):  # a terminal without UTF-8 stops nothing
        sys.stdout.reconfigure(errors="replace")

    try:
        cfg = parse_config(argv)
        if cfg.check:
            checks = derivation_checks()
            for name, claim, error, tolerance, ok in checks:
                print(f"{'ok' if ok else 'FAIL'}  {error:.1e} ≤ {tolerance:.0e}  {name}: {claim}")
            return int(not all(check.ok for check in checks))
        run = Run(cfg)
        with run.lock:  # lets the folder go
            execute(run)
        return 0
    except SystemExit as stop:  # --help
        return int(stop.code != 0)
    except KeyboardInterrupt:
        status, message = 130, "stopped; the same command, less --overwrite, continues"
    except Stop as stop:
        status, message = stop.status, str(stop)
    except Exception as error:
        path = Path(tempfile.mkdtemp(), "error.txt")
        path.write_text(traceback.format_exc(), encoding="utf-8")
        status, message = 1, f"{type(error).__name__}: {one_line(error)}; see {path}"
    print(f"brain.py: {message}", file=sys.stderr)
    return status

if __name__ == "__main__":
    sys.exit(main())
