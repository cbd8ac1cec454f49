"""`starflow serve` is the HTTP service, `starflow app` a web page on top of it."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from starflow.cli.options import Device, Flag, Precision, collection_off, pick_device, pick_dtype
from starflow.errors import UserError

if TYPE_CHECKING:
    from starflow.pipeline.pipeline import StarFlowPipeline
    from starflow.serve.service import Service

KEY = "STARFLOW_API_KEY"
"""The variable that holds the key which requests must carry."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeOptions:
    """Serve pictures over HTTP in the dialect of OpenAI's Images API, and likelihoods.

    Requests of many clients are drawn in batches; the model is shared by all. Where the environment has
    STARFLOW_API_KEY, requests must carry that key. SIGTERM lets the service finish what it has taken.
    """

    EXAMPLES: ClassVar[str] = """
        starflow serve
        starflow serve --model RUN/model --port 8080
        STARFLOW_API_KEY=secret starflow serve --host 0.0.0.0
        curl http://127.0.0.1:8000/v1/images/generations -H 'Content-Type: application/json' \\
            -d '{"prompt": "a red apple", "n": 2, "seed": 0}'
    """

    model: Annotated[str, Flag("bundled name, folder, or hub repository")] = "glyphs"
    host: Annotated[str, Flag("address to listen on; 0.0.0.0 is every network")] = "127.0.0.1"
    port: Annotated[int, Flag("port to listen on", "N")] = 8000
    device: Annotated[Device, Flag("where to compute")] = "auto"
    dtype: Annotated[Precision | None, Flag("precision of the flow (default: the model's own)")] = None
    batch: Annotated[int, Flag("rows drawn at once, candidates counted; memory may allow fewer", "N")] = 16
    queue: Annotated[int, Flag("pictures that may be here at once; more are answered 429", "N")] = 256
    timeout: Annotated[float, Flag("seconds that a request may take", "S")] = 600.0
    drain: Annotated[float, Flag("seconds after SIGTERM in which what is here is finished", "S")] = 30.0

    def __post_init__(self) -> None:
        check_address(self.port)
        for name, value in (("batch", self.batch), ("queue", self.queue)):
            if value < 1:
                raise UserError(f"--{name} is {value}, expected at least 1")
        for name, seconds in (("timeout", self.timeout), ("drain", self.drain)):
            if not 0 < seconds < 1e6:
                raise UserError(f"--{name} is {seconds:g}, expected seconds above 0")


@dataclass(frozen=True)
class AppOptions:
    """Open a web page that draws, edits and judges pictures; it needs no internet."""

    EXAMPLES: ClassVar[str] = """
        starflow app
        starflow app --model RUN/model --port 8080
    """

    model: Annotated[str, Flag("bundled name, folder, or hub repository")] = "glyphs"
    host: Annotated[str, Flag("address to listen on; 0.0.0.0 is every network")] = "127.0.0.1"
    port: Annotated[int, Flag("port to listen on", "N")] = 7860
    device: Annotated[Device, Flag("where to compute")] = "auto"

    def __post_init__(self) -> None:
        check_address(self.port)


def check_address(port: int) -> None:
    """Raises UserError: no port."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}, expected 0 (any that is free) to 65535")


def serve(options: ServeOptions) -> None:
    """Run `starflow serve`."""
    _need(("fastapi", "uvicorn", "prometheus_client", "python_multipart"), "serve")
    _let_threads_rest()
    with collection_off():
        from starflow.serve.images_api import create_app
        from starflow.serve.schemas import Limits
        from starflow.serve.service import Service, listen, run

    service = Service(
        lambda: _load(options.model, options.device, options.dtype),
        _name(options.model),
        limits=Limits(timeout=options.timeout),
        api_key=os.environ.get(KEY, ""),
        places=options.queue,
        max_rows=options.batch,
    )
    bound = listen(options.host, options.port)
    if options.host not in LOOPBACK and not service.api_key:
        print(f"warning: everybody who reaches {options.host} may draw: set {KEY} to ask for a key", file=sys.stderr)
    _tell_when_ready(service, f"'{service.name}' is served", options.host, bound.getsockname()[1])
    run(create_app(service), service, bound, options.drain)


def app(options: AppOptions) -> None:
    """Run `starflow app`."""
    _need(("fastapi", "uvicorn", "prometheus_client", "python_multipart", "gradio"), "app")
    _let_threads_rest()
    with collection_off():
        from starflow.serve.app import add_page
        from starflow.serve.images_api import create_app
        from starflow.serve.service import Service, listen, run

    service = Service(
        lambda: _load(options.model, options.device, None), _name(options.model), api_key=os.environ.get(KEY, "")
    )
    bound = listen(options.host, options.port)
    if options.host not in LOOPBACK:
        print(f"warning: everybody who reaches {options.host} may use the page", file=sys.stderr)
    _tell_when_ready(service, "the page is open", options.host, bound.getsockname()[1])
    run(add_page(create_app(service), service), service, bound, 5.0)


def _need(modules: Sequence[str], extra: str) -> None:
    """Raises UserError: the libraries of an extra are not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"'{missing[0]}' is not installed: run pip install 'starflow[{extra}]'")


def _load(model: str, device: Device, dtype: Precision | None) -> StarFlowPipeline:
    with collection_off():
        from starflow.pipeline.pipeline import StarFlowPipeline

        precision = None if dtype is None else pick_dtype(dtype)
        # A text encoder that is loaded for every batch would take longer than the batch.
        return StarFlowPipeline.from_pretrained(model, pick_device(device), precision, keep_text_encoder=True)


def _name(model: str) -> str:
    """What clients call a model: its name as it was given, of a folder the last part."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def _tell_when_ready(service: Service, what: str, host: str, port: int) -> None:
    """Print one line when requests are taken."""
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def wait() -> None:
        service.loaded.wait()
        gc.freeze()  # the model stays as long as the process: to look for cycles in it would only hold requests up
        if service.failure is None:
            print(f"starflow: {what} on {address}", flush=True)

    threading.Thread(target=wait, name="starflow-tell", daemon=True).start()


def _let_threads_rest() -> None:
    """Before torch is imported: GNU's OpenMP threads wait a moment for their next product, and then sleep.

    By default they turn for some 10 ms, on the cores that the compiled token loop and the connections want: a lone
    picture of the bundled model took 74 ms on two cores, and takes 27.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
