"""Checkpoints of sharded runs: a folder into which each rank writes what it holds, or one file of the whole.

A folder is one of :mod:`torch.distributed.checkpoint`, which holds the sharded tensors, with a file ``meta.pt`` beside
them: a checkpoint as any other, but for tensors without memory (of the device "meta") in the place of those. A single
file is what `HiFTStrategy` would have saved. When either is loaded every rank reads its own rows, so the number of
ranks may be another one.
"""

import contextlib
import pickle
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_with_path
from typing_extensions import override

from hift_lightning.checkpoint_io import META, StreamingCheckpointIO
from hift_lightning.engine.compatibility import check_weights
from hift_lightning.engine.errors import ConfigurationError
from hift_lightning.engine.shards import in_ranks_mesh, local, own_rows, whole_on_first_rank
from hift_lightning.strategies.several_ranks import SeveralRanks

_Change = Callable[[str, Tensor, DTensor], Any]
"""``(name in a folder, tensor, parameter) -> what stands for the tensor``."""
_When = Callable[[Mapping[Any, Any], Callable[[Any, Any], Any]], Mapping[Any, Any]]
"""``(mapping, function of key and value) -> mapping of what it gives``."""


class ShardedCheckpoints(SeveralRanks):
    """Mixed into a strategy for sharded modules, it saves and loads without putting parked state on the device."""

    _save_distributed_checkpoint: bool
    _host_mesh: DeviceMesh
    """The ranks, with tensors in host memory."""
    _folder: "_Folder | None" = None
    """Which tensors are read from that a loaded checkpoint only tells of."""
    _needs_all_ranks = True

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self._host_mesh = DeviceMesh.from_group(self._ranks.host_group, "cpu")

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True  # by `load_optimizer_state_dict`, as on one device

    # Until a checkpoint is written each rank has its own shards in it, as if it were alone.

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return Strategy.lightning_module_state_dict(self)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        self.engine_of(optimizer).residency.synchronize()
        return Strategy.optimizer_state(self, optimizer)

    @override
    def master_state_dict(self) -> dict[str, Any]:
        """The module's state dict, with the fp32 master in place of every weight that has one; whole on the first rank.

        All ranks call it together; one alone would wait for the others. On the first one, what is sharded is put
        together in host memory, one weight at a time; the others get what is not sharded alone.

        Raises:
            MisconfigurationException: before ``fit`` has set the training up.
        """
        weights = super().master_state_dict()
        whole: dict[DTensor, Tensor | None] = {}  # a tied weight has several names
        for name, parameter in self._sharded_parameters():
            if name not in weights:
                continue
            if parameter not in whole:
                whole[parameter] = whole_on_first_rank(local(weights[name]), parameter, self._ranks.host_group)
            weights[name] = whole[parameter]
        return {name: value for name, value in weights.items() if value is not None}

    # --- saving -----------------------------------------------------------------------------------------------------

    @override
    def _write(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None) -> None:
        if storage_options is not None:
            raise TypeError("`storage_options` are not for sharded checkpoints.")
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            self._write_folder(checkpoint, path)
            return

        def put_together(name: str, shard: Tensor, parameter: DTensor) -> Tensor | None:
            return whole_on_first_rank(local(shard), parameter, self._ranks.host_group)

        checkpoint = self._with_shards_changed(checkpoint, put_together, _now)
        self._on_first_rank(lambda: self._write_file(checkpoint, path))

    def _write_file(self, checkpoint: dict[str, Any], path: Path) -> None:
        if path.is_symlink() or not (path / META).is_file():
            self.checkpoint_io.save_checkpoint(checkpoint, path)
            return
        former = _set_aside(path)  # a file cannot take the place of a folder
        try:
            self.checkpoint_io.save_checkpoint(checkpoint, path)
        except BaseException:
            path.unlink(missing_ok=True)
            former.rename(path)
            raise
        shutil.rmtree(former, ignore_errors=True)

    def _write_folder(self, checkpoint: dict[str, Any], path: Path) -> None:
        shards: dict[str, Any] = {}

        def set_apart(name: str, shard: Tensor, parameter: DTensor) -> Tensor:
            on_device = isinstance(shard, DTensor)
            shards[name] = shard if on_device else in_ranks_mesh(shard, parameter, self._host_mesh)
            return torch.empty(parameter.shape, dtype=shard.dtype, device="meta")

        checkpoint = self._with_shards_changed(checkpoint, set_apart, _now)
        temporary = _hidden(path)
        self._on_first_rank(lambda: _make_anew(temporary))
        try:
            save(shards, storage_writer=FileSystemWriter(temporary), process_group=self._ranks.host_group)
        except CheckpointException as error:
            rank, cause = next(iter(error.failures.items()))
            raise ConfigurationError(
                f"The checkpoint `{path}` could not be saved (on rank {rank}: {cause[0]}); make room or mend the "
                "folder, or save to another one."
            ) from error

        def finish() -> None:
            StreamingCheckpointIO().save_checkpoint(checkpoint, temporary / META)
            _put_in_place(temporary, path)

        self._on_first_rank(finish)

    def _on_first_rank(self, act: Callable[[], None]) -> None:
        """Do something on one rank; if it fails, raise on all."""
        failure: Exception | None = None
        if self.is_global_zero:
            try:
                act()
            except (OSError, ConfigurationError) as error:
                failure = error
        told = self.broadcast(failure and str(failure))
        if failure is not None:
            raise failure
        if told is not None:
            raise ConfigurationError(told)

    # --- loading ----------------------------------------------------------------------------------------------------

    @override
    def _read(self, checkpoint_path: _PATH, weights_only: bool) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        if not path.is_dir():
            self._folder = None
            return self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        if not (path / META).is_file():
            raise ConfigurationError(
                f"The folder `{path}` is no checkpoint: it has no `{META}`; give one that `hift_fsdp2` has saved."
            )
        self._folder = _Folder(path, self._host_mesh)
        return StreamingCheckpointIO().load_checkpoint(path / META, weights_only=weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        saved = checkpoint["state_dict"]
        check_weights(self.lightning_module, saved, strict)
        parameters = dict(self._sharded_parameters())
        loaded: set[DTensor] = set()
        for name, parameter in parameters.items():
            if name in saved and parameter not in loaded:
                loaded.add(parameter)
                with torch.no_grad():
                    local(parameter).copy_(self._own_shard(f"state_dict.{name}", saved[name], parameter))
        others = {name: value for name, value in saved.items() if name not in parameters}
        self.lightning_module.load_state_dict(others, strict=False)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        parameters = dict(self._sharded_parameters())

        def own_rows_of(name: str, whole: Any) -> Any:
            return self._own_shard(f"state_dict.{name}", whole, parameters[name]) if name in parameters else whole

        def own_rows_of_whole(name: str, whole: Any) -> Any:
            return own_rows(whole, parameters[name]) if name in parameters else whole

        changed = self._with_shards_changed({**checkpoint, "state_dict": {}}, self._own_shard, _Later)
        changed["state_dict"] = _Later(checkpoint["state_dict"], own_rows_of)
        if "current_model_state" in checkpoint:  # of another strategy, under which weights were averaged
            changed["current_model_state"] = _Later(checkpoint["current_model_state"], own_rows_of_whole)
        super().load_optimizer_state_dict(changed)

    def _own_shard(self, name: str, whole: Tensor, parameter: DTensor) -> Tensor:
        if whole.is_meta:
            assert self._folder is not None
            return self._folder.read(name, parameter, whole.dtype)
        return own_rows(whole, parameter)

    # --- where shards are in a checkpoint ---------------------------------------------------------------------------

    def _with_shards_changed(self, checkpoint: dict[str, Any], change: _Change, when: _When) -> dict[str, Any]:
        """The checkpoint with something else in place of every tensor that the ranks share.

        Args:
            checkpoint: is left as it is.
            change: makes it.
            when: `_now`, or `_Later`: optimizer state and masters only when they are asked for.
        """
        parameters = dict(self._sharded_parameters())
        changed = {**checkpoint, "state_dict": dict(checkpoint["state_dict"])}
        made: dict[DTensor, Any] = {}  # a tied weight has several names
        for name, parameter in parameters.items():
            if name in changed["state_dict"]:
                if parameter not in made:
                    made[parameter] = change(f"state_dict.{name}", changed["state_dict"][name], parameter)
                changed["state_dict"][name] = made[parameter]
        if "optimizer_states" in checkpoint:
            changed["optimizer_states"] = [
                self._with_state_changed(i, state, change, when)
                for i, state in enumerate(checkpoint["optimizer_states"])
            ]
        if "hift" in checkpoint:
            engines = []
            for i, record in enumerate(checkpoint["hift"]["engines"]):

                def change_master(name: str, master: Tensor, prefix: str = f"masters_{i}") -> Any:
                    return change(f"{prefix}.{name}", master, parameters[name])

                engines.append({**record, "masters": when(record["masters"], change_master)})
            changed["hift"] = {**checkpoint["hift"], "engines": engines}
        return changed

    def _with_state_changed(
        self, index: int, state_dict: dict[str, Any], change: _Change, when: _When
    ) -> dict[str, Any]:
        names: dict[Any, str] = {}
        for name, parameter in self._sharded_parameters():
            names.setdefault(parameter, name)
        groups = zip(self.engines[index].optimizer.param_groups, state_dict["param_groups"], strict=False)
        pairs = (zip(saved["params"], group["params"], strict=False) for group, saved in groups)
        parameter_of = {saved_id: parameter for pair in pairs for saved_id, parameter in pair}

        def change_state(saved_id: Any, state: Any) -> Any:
            parameter = parameter_of.get(saved_id)
            if parameter is None or parameter not in names:
                return state

            def change_leaf(path: tuple[Any, ...], leaf: Any) -> Any:
                if not isinstance(leaf, Tensor) or leaf.dim() == 0:
                    return leaf
                keys = (str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
                return change(".".join((f"optimizer_{index}.state", names[parameter], *keys)), leaf, parameter)

            return tree_map_with_path(change_leaf, state)

        return {**state_dict, "state": when(state_dict["state"], change_state)}

    def _sharded_parameters(self) -> Iterator[tuple[str, DTensor]]:
        """All names of all sharded parameters, as in the module's state dict."""
        assert self.lightning_module is not None
        for name, value in self.lightning_module.state_dict(keep_vars=True).items():
            if isinstance(value, DTensor):
                yield name, value


def _now(saved: Mapping[Any, Any], make: Callable[[Any, Any], Any]) -> Mapping[Any, Any]:
    return {key: make(key, value) for key, value in saved.items()}


class _Later(Mapping[Any, Any]):
    """A mapping with values that are made of another's when they are asked for."""

    def __init__(self, saved: Mapping[Any, Any], make: Callable[[Any, Any], Any]) -> None:
        self._saved = saved
        self._make = make

    def __getitem__(self, key: Any) -> Any:
        return self._make(key, self._saved[key])

    def __iter__(self) -> Iterator[Any]:
        return iter(self._saved)

    def __len__(self) -> int:
        return len(self._saved)


class _Folder:
    """Reads this rank's rows of the tensors in a folder of :mod:`torch.distributed.checkpoint`, one at a time.

    Args:
        path: of the folder.
        mesh: the ranks, in host memory.

    Raises:
        ConfigurationError: if its index cannot be read, or a file is shorter than it tells.
    """

    def __init__(self, path: Path, mesh: DeviceMesh) -> None:
        self._path = path
        self._mesh = mesh
        self._reader = CarefulReader(path)
        with self._told("its index"):
            pieces = self._reader.read_metadata().storage_data.values()
        for piece in pieces:
            with self._told(f"`{piece.relative_path}`"):
                length = (path / piece.relative_path).stat().st_size
                if length < piece.offset + piece.length:
                    raise EOFError(f"it ends at byte {length:,}")

    def read(self, name: str, parameter: DTensor, dtype: torch.dtype) -> Tensor:
        """This rank's rows of a tensor of a parameter's shape, in host memory."""
        shard = torch.empty(local(parameter).shape, dtype=dtype)
        with self._told(f"`{name}`"), warnings.catch_warnings():
            # each rank reads for itself, which this tells of as if it were a mistake
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load({name: in_ranks_mesh(shard, parameter, self._mesh)}, storage_reader=self._reader, no_dist=True)
        return shard

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        # damaged files make the reader raise many unrelated types, or an error that is no `Exception`
        except (Exception, CheckpointException) as error:
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            raise ConfigurationError(
                f"The checkpoint `{self._path}` is not whole: {what} cannot be read "
                f"({(str(cause).strip() or type(cause).__name__).splitlines()[0]}); go on from an earlier one."
            ) from error


class CarefulReader(FileSystemReader):
    """Reads a folder's index once, and no objects in it but those that torch writes: unpickling others runs code."""

    _index: Metadata | None = None

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            path = Path(self.path) / ".metadata"
            with path.open("rb") as file:
                _IndexUnpickler(file).load()
            self._index = super().read_metadata(*args, **kwargs)
        return self._index


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _IN_INDEX or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"`{module}.{name}` does not belong into the index of a checkpoint")


_IN_INDEX = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "Path"),
    ("collections", "OrderedDict"),
}


def _hidden(path: Path) -> Path:
    """A hidden name beside the path, without its own, which the Trainer might take for that of a requeued job."""
    return path.with_name(f".hift-saving-{zlib.crc32(path.name.encode()):08x}")


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(0o700, parents=True)


def _set_aside(folder: Path) -> Path:
    """Rename a folder to what nothing else is called, until what takes its place is there."""
    former = _hidden(folder).with_name(f"{_hidden(folder).name}-former")
    shutil.rmtree(former, ignore_errors=True)  # left by a process that was killed while it removed it
    return folder.rename(former)


def _put_in_place(folder: Path, path: Path) -> None:
    """Rename a complete folder; what was there before goes afterwards."""
    if path.is_dir() and not path.is_symlink():
        former = _set_aside(path)
        folder.rename(path)
        shutil.rmtree(former, ignore_errors=True)
        return
    path.unlink(missing_ok=True)
    folder.rename(path)
