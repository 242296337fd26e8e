"""Training of a causal language model on a list of documents: small ones from scratch, or a given one
further.

The models are those of `transformers`; what is here is the plain loop around them: documents packed into
sequences, AdamW, a cosine schedule, checkpoints. Threads are the process's own: with one thread on a CPU the
same job gives the same bytes, also after a kill. A job is a folder:

    job.json                  what is trained and how (`TrainingJob`)
    documents.parquet         the documents of one epoch, `text`; the seed gives every epoch its order
    checkpoint.safetensors    weights, optimiser and losses so far, replaced as the training goes
    loss.parquet              step, loss (nats per token), learning_rate, seconds
    model/                    the trained model with its tokenizer, as `transformers` writes it
    done.json                 checksums of the model's files, last: a folder that holds it is complete
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from lmd3.errors import MissingDependencyError, ModelError, ParameterError, VerificationError
from lmd3.progress import ProgressFactory, silent
from lmd3.results import read_json, write_json, write_parquet

#: The token between documents; also the beginning of each.
END_OF_TEXT = "<|endoftext|>"

#: Columns of `loss.parquet`.
LOSS = pa.schema(
    [
        ("step", pa.int64()),
        ("loss", pa.float64()),
        ("learning_rate", pa.float64()),
        ("seconds", pa.float64()),
    ]
)

_DONE, _CHECKPOINT, _MODEL = "done.json", "checkpoint.safetensors", "model"


@dataclass(frozen=True)
class TrainingJob:
    """What is trained and how.

    Attributes:
        model: a folder of a model to train further, or None: a GPT-2 configuration from scratch.
        tokenizer: folder of the tokenizer; None: the model's own.
        width, layers, heads: of a model from scratch.
        context: tokens of a sequence.
        batch: sequences of one update.
        steps: updates.
        learning_rate: its peak; it rises over `warmup` steps and falls along a cosine to `floor` of it.
        weight_decay: AdamW's.
        clip: largest norm of a gradient.
        seed: of the initialisation, of dropout and of the documents' order.
        lora: rank of a low-rank finetuning (by `peft`), merged at the end; None: all weights are trained.
        checkpoint_seconds: seconds between checkpoints.
    """

    model: str | None = None
    tokenizer: str | None = None
    width: int = 128
    layers: int = 2
    heads: int = 4
    context: int = 256
    batch: int = 8
    steps: int = 100
    learning_rate: float = 3e-3
    warmup: int = 50
    floor: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    lora: int | None = None
    checkpoint_seconds: float = 60.0

    @property
    def trained_on(self) -> dict[str, Any]:
        """The settings that the result depends on."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "checkpoint_seconds"}


def require_torch(what: str) -> None:
    """Raises a `MissingDependencyError` where the packages of neural models are not installed."""
    try:
        import tokenizers  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs a package that is not installed: {error.name or error}",
            remedy="pip install 'lmd3[encode]', or take --model ngram",
        ) from None


def train_tokenizer(texts: Iterable[str], vocabulary: int, folder: Path) -> Path:
    """A byte-level BPE tokenizer learned from texts, written as `transformers` reads it; not made twice.

    Args:
        texts: what it is learned from.
        vocabulary: its size, with the 256 bytes and the end of a text; at least 257.
        folder: where it goes.
    """
    if (folder / "tokenizer.json").is_file():
        return folder
    import tokenizers
    import transformers

    if vocabulary < 257:
        raise ParameterError(f"a byte-level vocabulary has at least 257 tokens, not {vocabulary}")
    tokenizer = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
    tokenizer.train_from_iterator(
        texts, vocab_size=vocabulary, min_frequency=2, special_tokens=[END_OF_TEXT], show_progress=False
    )
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    wrapped: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(temporary)
    temporary.replace(folder)
    return folder


def load_tokenizer(folder: str) -> Any:
    """The tokenizer in a folder.

    Raises:
        ModelError: it can't be loaded, or has no token for the end of a text.
    """
    import transformers

    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"its tokenizer can't be loaded: {_line(error)}", file=folder) from None
    if tokenizer.eos_token_id is None:
        raise ModelError("its tokenizer has no token for the end of a text", file=folder)
    return tokenizer


def load_model(folder: str) -> Any:
    """The causal language model in a folder, in float32, proven to fit its tokenizer.

    Raises:
        ModelError: it can't be loaded, or its tokenizer has tokens that it lacks.
    """
    import transformers

    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, dtype="float32"
        )
    except Exception as error:
        raise ModelError(f"not a causal language model: {_line(error)}", file=folder) from None
    return model


def check_fit(model: Any, tokenizer: Any, folder: str) -> None:
    """Refuses a tokenizer with tokens that the model has no embedding for."""
    rows = int(model.get_input_embeddings().num_embeddings)
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer does not match the model: it has {len(tokenizer)} tokens, the model {rows}",
            file=folder,
            remedy="name the tokenizer that the model was trained with",
        )


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> NDArray[np.int64]:
    """Tokens of each text, with the one that ends it."""
    counts: list[int] = []
    for start in range(0, len(texts), 1000):
        batch = list(texts[start : start + 1000])
        encoded = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        counts += [len(ids) + 1 for ids in encoded]
    return np.array(counts, dtype=np.int64)


def write_job(folder: Path, job: TrainingJob, documents: Sequence[str]) -> None:
    """Makes a job's folder; one that is there stays where it is of the same job and documents.

    Raises:
        ParameterError: the folder holds another job.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = hashlib.blake2b(digest_size=16)
    for document in documents:
        text.update(document.encode())
        text.update(b"\0")
    entry = job.trained_on | {"documents": text.hexdigest()}
    path = folder / "job.json"
    if path.exists():
        before = read_json(path)
        if {k: before.get(k) for k in entry} != entry:
            changed = next(k for k in entry if before.get(k) != entry[k])
            raise ParameterError(
                f"holds another training run: {changed} has changed",
                file=str(folder),
                remedy="name another -o, or give --force",
            )
        return
    write_parquet(folder / "documents.parquet", pa.table({"text": pa.array(documents, pa.string())}))
    write_json(path, entry | {"checkpoint_seconds": job.checkpoint_seconds})


def is_done(folder: Path) -> bool:
    """Whether the model of a job is there, whole."""
    try:
        check_model(folder)
    except (VerificationError, ModelError):
        return False
    return True


def check_model(folder: Path) -> Path:
    """The folder of a job's model, proven whole by its checksums.

    Raises:
        ModelError: the training has not finished.
        VerificationError: a file is not what was written.
    """
    if not (folder / _DONE).is_file():
        raise ModelError("not trained to the end", file=str(folder), remedy="give the same command again")
    for name, digest in read_json(folder / _DONE)["files"].items():
        path = folder / _MODEL / name
        if not path.is_file() or _digest(path) != digest:
            raise VerificationError("is not what was written: damaged or cut short", file=str(path))
    return folder / _MODEL


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sequences(tokenizer: Any, documents: Sequence[str], job: TrainingJob) -> Iterator[list[int]]:
    """The job's sequences without end: documents in each epoch's order, ended and packed."""
    end = tokenizer.eos_token_id
    tokens: list[list[int]] = []
    for start in range(0, len(documents), 1000):
        batch = list(documents[start : start + 1000])
        tokens += tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
    buffer: list[int] = [end]
    epoch = 0
    while True:
        order = np.random.default_rng([job.seed, epoch]).permutation(len(tokens))
        for document in order:
            buffer += tokens[document]
            buffer.append(end)
            while len(buffer) >= job.context:
                yield buffer[: job.context]
                del buffer[: job.context]
        epoch += 1


def learning_rate(job: TrainingJob, step: int) -> float:
    """The rate of a step, counted from 0."""
    if step < job.warmup:
        return job.learning_rate * (step + 1) / job.warmup
    done = (step - job.warmup) / max(1, job.steps - job.warmup)
    return job.learning_rate * (job.floor + (1 - job.floor) * 0.5 * (1 + math.cos(math.pi * done)))


def train(folder: Path, *, progress: ProgressFactory | None = None) -> Path:
    """Trains a job to its end, from its last checkpoint if there is one, and returns the model's folder.

    Raises:
        VerificationError: the checkpoint is damaged: it is set aside as `checkpoint.damaged`, and the same
            command starts this run anew.
        ModelError: the model or tokenizer given can't be used.
    """
    import torch

    if is_done(folder):
        return folder / _MODEL
    settings = read_json(folder / "job.json")
    job = TrainingJob(**{f.name: settings[f.name] for f in dataclasses.fields(TrainingJob)})
    documents = pq.read_table(folder / "documents.parquet")["text"].to_pylist()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(job.seed)
    tokenizer = load_tokenizer(job.tokenizer or str(job.model))
    model = _model(job, tokenizer)
    model.train()
    named = {name: weights for name, weights in model.named_parameters() if weights.requires_grad}
    optimizer = torch.optim.AdamW(
        named.values(), lr=job.learning_rate, betas=(0.9, 0.95), weight_decay=job.weight_decay
    )
    losses: list[float] = []
    rates: list[float] = []
    times: list[float] = []
    path = folder / _CHECKPOINT
    if path.exists():
        try:
            losses, rates, times = _restore(path, named, optimizer)
        except VerificationError:
            path.replace(path.with_suffix(".damaged"))
            raise
    stream = sequences(tokenizer, documents, job)
    for _ in range(len(losses) * job.batch):
        next(stream)
    saved = started = time.monotonic()
    before = times[-1] if times else 0.0
    with (progress or silent)(f"training {folder.name}", job.steps, "steps") as bar:
        for step in range(len(losses), job.steps):
            rate = learning_rate(job, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            ids = torch.tensor([next(stream) for _ in range(job.batch)])
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(named.values(), job.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            rates.append(rate)
            now = time.monotonic()
            times.append(round(before + now - started, 3))
            if not math.isfinite(losses[-1]):
                raise ModelError(f"the loss is not finite at step {step}", remedy="lower --learning-rate")
            bar.update(step + 1)
            if now - saved >= job.checkpoint_seconds and step + 1 < job.steps:
                _save(path, named, optimizer, losses, rates, times)
                saved = time.monotonic()
    _finish(folder, model, tokenizer, job, losses, rates, times)
    return folder / _MODEL


def _model(job: TrainingJob, tokenizer: Any) -> Any:
    import transformers

    if job.model is None:
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=job.context,
            n_embd=job.width,
            n_layer=job.layers,
            n_head=job.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return transformers.GPT2LMHeadModel(config)
    model = load_model(job.model)
    check_fit(model, tokenizer, job.model)
    if job.lora is None:
        return model
    try:
        import peft
    except ImportError:
        raise MissingDependencyError(
            "low-rank finetuning needs a package that is not installed: peft",
            remedy="pip install 'lmd3[lora]', or leave --lora out",
        ) from None
    config = peft.LoraConfig(
        r=job.lora, lora_alpha=2 * job.lora, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def _finish(
    folder: Path,
    model: Any,
    tokenizer: Any,
    job: TrainingJob,
    losses: list[float],
    rates: list[float],
    times: list[float],
) -> None:
    if job.lora is not None:
        model = model.merge_and_unload()
    model.eval()
    temporary = folder / (_MODEL + ".tmp")
    for place in (temporary, folder / _MODEL):
        shutil.rmtree(place, ignore_errors=True)
    model.save_pretrained(temporary, safe_serialization=True)
    tokenizer.save_pretrained(temporary)
    temporary.replace(folder / _MODEL)
    columns = {"step": range(len(losses)), "loss": losses, "learning_rate": rates, "seconds": times}
    write_parquet(folder / "loss.parquet", pa.table({k: list(v) for k, v in columns.items()}, schema=LOSS))
    files = {path.name: _digest(path) for path in sorted((folder / _MODEL).iterdir()) if path.is_file()}
    write_json(folder / _DONE, {"steps": len(losses), "final_loss": losses[-1], "files": files})
    (folder / _CHECKPOINT).unlink(missing_ok=True)


def _checksum(tensors: dict[str, Any], meta: dict[str, str]) -> str:
    digest = hashlib.blake2b(json.dumps(meta, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _save(path: Path, named: dict[str, Any], optimizer: Any, losses: list[float], *more: list[float]) -> None:
    """Writes a checkpoint in the place of the last one, whole or not at all."""
    import torch
    from safetensors.torch import save_file

    tensors = {"random": torch.get_rng_state()}
    for name, weights in named.items():
        state = optimizer.state[weights]
        tensors[f"w.{name}"] = weights.detach().cpu()
        tensors[f"m.{name}"] = state["exp_avg"].cpu()
        tensors[f"v.{name}"] = state["exp_avg_sq"].cpu()
    # Copies: weights that share memory are refused by the format.
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    meta = {
        "losses": json.dumps(losses),
        "rates": json.dumps(more[0]),
        "times": json.dumps(more[1]),
    }
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata=meta | {"checksum": _checksum(tensors, meta)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _restore(path: Path, named: dict[str, Any], optimizer: Any) -> tuple[list[float], ...]:
    """Puts a checkpoint into the model and the optimiser and returns the losses, rates and times so far.

    Raises:
        VerificationError: it is cut short, damaged, or of another model; nothing has been changed then.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise VerificationError(
            f"the checkpoint can't be read: {_line(error)}",
            file=str(path),
            remedy="give the same command again: this training starts anew",
        ) from None
    expected = meta.pop("checksum", None)
    wanted = {"random"} | {f"{kind}.{name}" for kind in "wmv" for name in named}
    if expected != _checksum(tensors, meta) or set(tensors) != wanted:
        raise VerificationError(
            "the checkpoint is damaged or of another model",
            file=str(path),
            remedy="give the same command again: this training starts anew",
        )
    losses, rates, times = (json.loads(meta[name]) for name in ("losses", "rates", "times"))
    with torch.no_grad():
        for name, weights in named.items():
            weights.copy_(tensors[f"w.{name}"])
            optimizer.state[weights] = {
                "step": torch.tensor(float(len(losses))),
                "exp_avg": tensors[f"m.{name}"].clone(),
                "exp_avg_sq": tensors[f"v.{name}"].clone(),
            }
    torch.set_rng_state(tensors["random"])
    return losses, rates, times
