"""A judge behind HTTP with FastAPI. Requests that arrive while it is busy are graded together, as one batch.

python examples/serve.py --model runs/x/final
curl -d '{"instruction": "Name a fruit.", "response": "A pear.", "rubric": "Is it one?"}' localhost:8000/grade
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from fastapi import Body, FastAPI, HTTPException, Response
from fastapi import Request as Connection
from pydantic import BaseModel

from real_fast import GradeError, Judge
from real_fast.errors import JudgeError


class Request(BaseModel):
    """What :meth:`Judge.grade` takes."""

    instruction: str
    response: str
    rubric: str | dict[str, str] = ""
    reference_answer: str | None = None
    seed: int = 0


def make_app(load: Callable[[], Judge]) -> FastAPI:
    """The application. The judge is loaded when it starts, in the process that serves, and freed when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with load() as judge:
            app.state.judge = judge
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/grade", response_model=None)
    async def grade(connection: Connection, request: Request = Body()) -> dict[str, Any] | Response:  # noqa: B008
        graded = asyncio.ensure_future(app.state.judge.agrade(**request.model_dump()))
        gone = asyncio.ensure_future(hung_up(connection))
        try:
            await asyncio.wait({graded, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not graded.done():
                return Response(status_code=499)  # nobody reads it; nginx's code for that, in the log
            return asdict(graded.result())
        except GradeError as error:  # nothing to grade, a prompt that is too long: the caller's to mend
            raise HTTPException(422, str(error)) from error
        except JudgeError as error:  # the engine failed, or the judge is closed: not the caller's fault
            raise HTTPException(503, str(error)) from error
        finally:
            graded.cancel()  # one that still waits gives its place to others
            gone.cancel()

    return app


async def hung_up(connection: Connection) -> None:
    """Return when the client has closed the connection: a handler is not told by itself."""
    while (await connection.receive())["type"] != "http.disconnect":
        pass


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder, or a model on the Hugging Face hub")
    parser.add_argument("--n", type=int, default=1, help="feedbacks a response")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()

    import uvicorn

    # One worker: a second process would load the model once more.
    uvicorn.run(make_app(lambda: Judge(args.model, n=args.n)), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
