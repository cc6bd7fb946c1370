"""The thread that runs jobs, and the line in front of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from memorizing.serving.line import Job, Line
from memorizing.serving.requests import RequestError

LONG_S = 60.0


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line(most_waiting=2)
    yield line
    line.close()


def run(work: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), LONG_S))


def hold(entered: threading.Event) -> Callable[[Job], None]:
    """Work that goes on until it is given up or out of time."""

    def work(job: Job) -> None:
        entered.set()
        job.tell("begun")
        while True:
            job.check()
            entered.wait(0.001)

    return work


def test_jobs_run_one_after_another_in_their_order(line: Line):
    told: list[int] = []

    async def ask() -> list[Any]:
        jobs = []
        for number in range(3):

            def work(job: Job, number: int = number) -> None:
                told.append(number)
                job.tell(number)
                job.tell(-number)

            jobs.append(Job(work, LONG_S))
        first = Job(lambda job: job.tell(threading.current_thread().name), LONG_S)
        line.add(first)
        name = await first.wait()
        for job in jobs[:2]:
            line.add(job)
        pairs = [(await job.wait(), await job.wait()) for job in jobs[:2]]
        return [name, *pairs]

    assert run(ask) == ["memorizing-model", (0, 0), (1, -1)]
    assert told == [0, 1]


def test_beyond_the_limit_jobs_are_refused_and_those_given_up_make_room(line: Line):
    entered = threading.Event()

    async def ask() -> None:
        running = Job(hold(entered), LONG_S)
        line.add(running)
        assert await running.wait() == "begun"
        waiting = [Job(lambda job: job.tell("done"), LONG_S) for _ in range(3)]
        line.add(waiting[0])
        line.add(waiting[1])
        assert (line.num_running, line.num_waiting) == (1, 2)
        with pytest.raises(RequestError) as caught:
            line.add(waiting[2])
        assert caught.value.status == 429
        line.drop(waiting[0])
        line.add(waiting[2])
        line.drop(running)
        assert await waiting[1].wait() == "done"
        assert await waiting[2].wait() == "done"

    run(ask)


def test_with_no_room_to_wait_a_free_thread_still_takes_a_job():
    line = Line(most_waiting=0)
    entered = threading.Event()

    async def ask() -> None:
        first = Job(hold(entered), LONG_S)
        line.add(first)
        assert await first.wait() == "begun"
        with pytest.raises(RequestError):
            line.add(Job(hold(entered), LONG_S))

    run(ask)
    line.close()


@pytest.mark.parametrize(
    ("error", "status"), [(RequestError(404, "no"), 404), (ZeroDivisionError("a secret"), 500)]
)
def test_what_a_job_raises_is_raised_where_it_is_waited_for(
    line: Line, error: Exception, status: int, capsys: pytest.CaptureFixture[str]
):
    def work(job: Job) -> None:
        raise error

    async def ask() -> RequestError:
        failing, next_one = Job(work, LONG_S), Job(lambda job: job.tell("well"), LONG_S)
        line.add(failing)
        line.add(next_one)
        with pytest.raises(RequestError) as caught:
            await failing.wait()
        assert await next_one.wait() == "well"
        return caught.value

    caught = run(ask)
    assert caught.status == status
    assert "secret" not in str(caught.to_dict())
    assert ("ZeroDivisionError: a secret" in capsys.readouterr().err) == (status == 500)


def test_closing_ends_what_runs_and_answers_what_waits():
    line = Line(most_waiting=5)

    async def ask() -> None:
        running, waiting = (
            Job(hold(threading.Event()), LONG_S),
            Job(hold(threading.Event()), LONG_S),
        )
        line.add(running)
        line.add(waiting)
        assert await running.wait() == "begun"
        await asyncio.to_thread(line.close)
        for job in (running, waiting):
            with pytest.raises(RequestError) as caught:
                await job.wait()
            assert caught.value.status == 503
        with pytest.raises(RequestError, match="the server stops"):
            line.add(waiting)

    run(ask)
