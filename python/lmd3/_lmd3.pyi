"""Type stubs of the native core (checked against it by stubtest)."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__version__: str

# --- text: the hashing encoder, the n-gram model, word counts (src/python/text.rs) ---

@final
class HashingFitter:
    """Counts document frequencies over texts, to make a `HashingEncoder`."""

    def __new__(cls, seed: int = 0, max_texts: int = 262144) -> HashingFitter: ...
    def add(self, texts: list[str]) -> None: ...
    @property
    def seen(self) -> int: ...
    def finish(self, dim: int) -> HashingEncoder: ...

@final
class HashingEncoder:
    """The built-in lexical encoder with its frozen idf."""

    @staticmethod
    def from_bytes(data: bytes) -> HashingEncoder: ...
    def to_bytes(self) -> bytes: ...
    @property
    def dim(self) -> int: ...
    @property
    def fitted_texts(self) -> int: ...
    @property
    def seen_texts(self) -> int: ...
    @property
    def features(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def unknown(self, texts: list[str], max_words: int | None = None) -> tuple[int, int]: ...
    def encode(
        self, texts: list[str], max_words: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]: ...

def hash_ids(ids: list[str], seed: int) -> NDArray[np.uint64]: ...
def word_spans(texts: list[str]) -> list[NDArray[np.uint32]]: ...

@final
class NgramCounts:
    """Counts of an order-3 model; texts can be added at any time, also to a copy."""

    def __new__(cls) -> NgramCounts: ...
    def add(self, texts: list[str]) -> None: ...
    def copy(self) -> NgramCounts: ...
    def model(self, spelled: bool = False) -> Ngram: ...
    @property
    def texts(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...

@final
class Ngram:
    """An interpolated Kneser–Ney model of order 3."""

    def score(
        self, texts: list[str], prompts: list[str] | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.uint32], NDArray[np.uint32]]: ...
    def log_probability(self, context: list[str], token: str | None, from_start: bool = False) -> float: ...
    @property
    def discounts(self) -> list[list[float]]: ...

@final
class TokenCounts:
    """Word counts of a stream of texts, in bounded memory."""

    def __new__(cls, max_words: int = 8388608) -> TokenCounts: ...
    def add(self, texts: list[str]) -> None: ...
    def cross_entropy(self, texts: list[str]) -> tuple[NDArray[np.float64], NDArray[np.uint32]]: ...
    def rarest(self, texts: list[str]) -> NDArray[np.float64]: ...
    @property
    def tokens(self) -> int: ...
    @property
    def words(self) -> int: ...
    @property
    def forgotten(self) -> int: ...

@final
class Overlap:
    """The largest share of each query's n-grams that one text of a stream holds, and its copies there."""

    def __new__(cls, queries: list[str], n: int = 5) -> Overlap: ...
    def add(self, texts: list[str]) -> None: ...
    def result(self) -> tuple[NDArray[np.float64], NDArray[np.uint64]]: ...
    @property
    def n(self) -> int: ...

# --- store: mapped stores and the shard writer (src/python/store.rs) ---

@final
class Store:
    """An open store: a folder with a manifest, or bare vectors, mapped."""

    def __new__(cls, path: str | os.PathLike[str]) -> Store: ...
    @staticmethod
    def of_pieces(
        path: str | os.PathLike[str],
        pieces: Sequence[tuple[str | os.PathLike[str], tuple[str, int, int, int] | None]],
        groups: NDArray[np.uint32] | None = None,
        weights: NDArray[np.float32] | None = None,
    ) -> Store: ...
    @property
    def n(self) -> int: ...
    @property
    def d(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shards(self) -> list[tuple[Path, int, int]]: ...
    def read_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]: ...
    def group_codes(self) -> NDArray[np.uint32] | None: ...
    def check_finite(self, threads: int = 1) -> None: ...
    def norms(self, threads: int = 1) -> list[tuple[float, int, float, int]]: ...

@final
class ShardWriter:
    """Writes the embeddings of one shard."""

    def __new__(cls, folder: str | os.PathLike[str], number: int, d: int, dtype: str) -> ShardWriter: ...
    @property
    def rows(self) -> int: ...
    @property
    def rounding(self) -> float: ...
    def append(self, vectors: NDArray[np.float32]) -> None: ...
    def finish(self) -> tuple[int, tuple[str, int, str], tuple[str, int, str] | None]: ...
    def abandon(self) -> None: ...

def checksum(path: str | os.PathLike[str]) -> tuple[str, int]: ...
def xxh3(data: bytes) -> str: ...
def end_where_files_are_cut_short(json: bool) -> None: ...

# --- scan: exact kernel sums (src/python/estimate.rs, src/python/results.rs, src/python/system.rs) ---

@final
class Estimate:
    """Exact sums and densities under one set of rows, for Q queries and B kernels."""

    @property
    def log_density(self) -> NDArray[np.float64]: ...
    @property
    def log_sum(self) -> NDArray[np.float64]: ...
    @property
    def ess(self) -> NDArray[np.float64]: ...
    @property
    def excluded(self) -> NDArray[np.uint64]: ...
    @property
    def rows(self) -> int: ...
    @property
    def weight(self) -> float: ...

@final
class Scan:
    """The result of a scan."""

    @property
    def total(self) -> Estimate: ...
    @property
    def groups(self) -> dict[int, Estimate]: ...
    @property
    def neighbor_rows(self) -> NDArray[np.int64]: ...
    @property
    def neighbor_distances(self) -> NDArray[np.float64]: ...
    @property
    def duplicates(self) -> NDArray[np.uint64]: ...
    @property
    def max_projection(self) -> NDArray[np.float32]: ...
    @property
    def row_sum(self) -> NDArray[np.float64]: ...
    @property
    def rows(self) -> int: ...
    @property
    def level(self) -> str: ...

def scan(
    source: Store | NDArray[np.float32] | NDArray[np.float16],
    queries: NDArray[np.float32],
    kernels: Sequence[tuple[str, float]],
    *,
    neighbors: int = 0,
    by_group: bool = False,
    group_map: NDArray[np.uint32] | None = None,
    exclude_rows: NDArray[np.int64] | None = None,
    exclude_within: float = 0.0,
    row_rounding: float = 0.0,
    max_cosine: bool = False,
    row_sum: bool = False,
    weights: NDArray[np.float32] | None = None,
    precision: str = "float32",
    threads: int = 0,
    memory: int = 1073741824,
    io: str = "mmap",
    progress: Callable[[int, int], None] | None = None,
) -> Scan: ...

@final
class Fold:
    """Folds parts into the result of a scan, in their order."""

    def __new__(cls, queries: int, kernels: int, neighbors: int, level: str) -> Fold: ...
    def add(self, part: dict[str, NDArray[Any]]) -> None: ...
    @property
    def next(self) -> tuple[int, int]: ...
    def finish(self) -> Scan: ...

def segments(source: Store | NDArray[np.float32] | NDArray[np.float16]) -> list[int]: ...
def scan_parts(
    source: Store | NDArray[np.float32] | NDArray[np.float16],
    queries: NDArray[np.float32],
    kernels: Sequence[tuple[str, float]],
    start: int,
    end: int,
    sink: Callable[[dict[str, NDArray[Any]]], None],
    *,
    neighbors: int = 0,
    by_group: bool = False,
    group_map: NDArray[np.uint32] | None = None,
    exclude_rows: NDArray[np.int64] | None = None,
    exclude_within: float = 0.0,
    row_rounding: float = 0.0,
    max_cosine: bool = False,
    row_sum: bool = False,
    weights: NDArray[np.float32] | None = None,
    precision: str = "float32",
    threads: int = 0,
    memory: int = 1073741824,
    io: str = "mmap",
    progress: Callable[[int, int], None] | None = None,
) -> None: ...

# --- index: rows in lists, near rows, estimates of kernel sums (src/python/index.rs) ---

@final
class Index:
    """An open index."""

    def __new__(cls, folder: str | os.PathLike[str]) -> Index: ...
    @property
    def manifest(self) -> str: ...
    @property
    def sizes(self) -> NDArray[np.uint64]: ...
    @property
    def ids(self) -> NDArray[np.uint32]: ...
    @property
    def moments(self) -> NDArray[np.float64]: ...
    @property
    def means(self) -> NDArray[np.float32]: ...
    def nearest_lists(self, queries: NDArray[np.float32], count: int) -> NDArray[np.int64]: ...
    def search(
        self,
        queries: NDArray[np.float32],
        k: int,
        probes: int,
        source: Store | NDArray[Any] | None = None,
        threads: int = 0,
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]: ...
    def stage(
        self,
        queries: NDArray[np.float32],
        keys: NDArray[np.uint64],
        kernels: Sequence[tuple[str, float]],
        rows: NDArray[np.uint64],
        *,
        own: NDArray[np.int64] | None = None,
        aims: NDArray[np.float64] | None = None,
        whole_cost: float = 1.0,
        target: float = 0.01,
        block: int = 8,
        group_map: NDArray[np.uint32] | None = None,
        group_count: int = 0,
        seed: int = 0,
        stage: int = 1,
        threads: int = 0,
    ) -> dict[str, NDArray[Any]]: ...
    def verify(self) -> None: ...

def build_index(
    source: Store | NDArray[Any],
    folder: str | os.PathLike[str],
    *,
    fingerprint: str,
    lists: int = 0,
    dtype: str = "int8",
    seed: int = 0,
    groups: int = 0,
    weights: NDArray[np.float32] | None = None,
    threads: int = 0,
    memory: int = 1073741824,
    pause: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> bool: ...
def route_rows(
    source: Store | NDArray[Any],
    partial: str | os.PathLike[str],
    start: int,
    end: int,
    threads: int = 0,
) -> NDArray[np.uint64]: ...
def draw_keys(ids: list[str]) -> NDArray[np.uint64]: ...
def sample_rows(
    source: Store | NDArray[Any],
    queries: NDArray[np.float32],
    keys: NDArray[np.uint64],
    kernels: Sequence[tuple[str, float]],
    rows: int,
    *,
    near: NDArray[np.int64] | None = None,
    permuted: bool = False,
    mean: NDArray[np.float64] | None = None,
    sq_norm: float = 0.0,
    weights: NDArray[np.float32] | None = None,
    seed: int = 0,
    threads: int = 0,
) -> dict[str, NDArray[Any]]: ...
def neighbor_sums(
    distances: NDArray[np.float64],
    kernels: Sequence[tuple[str, float]],
    weights: NDArray[np.float32] | None = None,
) -> dict[str, NDArray[Any]]: ...
def peak_arithmetic(threads: int, seconds: float) -> tuple[float, float | None]: ...
def peak_integers(threads: int, seconds: float) -> tuple[float, float | None]: ...
def cached_dots(seconds: float) -> float: ...
def clock(seconds: float) -> float | None: ...
def read_bandwidth(threads: int, bytes: int, seconds: float) -> float: ...
def simd_level() -> str: ...
def simd_notice() -> str | None: ...
def simd_levels() -> list[str]: ...
