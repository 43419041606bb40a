"""The HTTP API, the same on gunicorn and on granian.

Waiting requests share a read, but no answer is older than its request or shows anything of another
client's. gunicorn.conf.py holds settings alone, so that gunicorn's own options and signals work.
"""

import json
import random
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import partial
from http import HTTPStatus
from wsgiref.validate import validator

import psutil
import pytest
from werkzeug.test import create_environ, run_wsgi_app

import conftest
import usercount
from conftest import ADD_USERS, HERE, SERVERS, TIMESTAMP_PATTERN, in_background, wait_until

HELLO = """
from usercount import app, request
@app.route("/hello", methods=["GET", "POST"])
def hello():
    return [request.method, request.args["n"], request.headers["X-N"], request.get_json()]
"""
HEADERS = "Content-Type", "Cache-Control", "Content-Length"
METHODS = {"GET", "HEAD", "OPTIONS"}
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
HOSTILE_REQUESTS = [
    b"GET /api/usercount HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: \xff\x00@evil:99999\r\nAccept: nothing/here;q=-1\r\n\r\n",
    b"GET /api/usercount HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n",
    b"get /api/usercount?totalUsers=7 HTTP/1.0\r\nX-Forwarded-Host: a, b\r\n\r\n",
    b"HEAD /api/usercount HTTP/1.1\r\nRange: bytes=1-2\r\n\r\n",
    b"GET /" + b"%" * 9000 + b" HTTP/1.1\r\n\r\n",
    b"POST /health HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcGET /health HTTP/1.1\r\n\r\n",
    b"GET /api/usercount HTTP/1.1\r\nHost: x",
]


@pytest.fixture(scope="module", params=SERVERS)
def service(params, template, tmp_path_factory, request):
    """The application with a route of somebody's own, on either server."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "hello.py").write_text(HELLO)
    with conftest.throwaway_database(params, template) as database:
        options = {"PYTHONPATH": str(folder), "GUNICORN_CMD_ARGS": "--access-logfile=-"}
        settings, server = conftest.environment(params, database, **options), request.param
        with conftest.running_service(settings, folder, "hello:app", server=server) as service:
            service.server, service.database = server, database
            yield service


@pytest.fixture
def cursor(params, service):
    with conftest.open_cursor(params, service.database) as cursor:
        cursor.execute("TRUNCATE user_list")
        yield cursor


def test_answers_in_the_agreed_shape(service, cursor):
    cursor.execute(ADD_USERS, (1, 42))
    timestamp = """to_char(last_updated AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"')"""
    last_updated = cursor.value(f"SELECT {timestamp} FROM user_stats")
    healthy = '"database": {"status": "healthy", "connected": true}'
    for path, pattern in {
        "/api/usercount": f'{{"totalUsers": 42, "lastUpdated": "{last_updated}"}}\n',
        "/health": f'{{"status": "healthy", "timestamp": "{TIMESTAMP_PATTERN}", {healthy}}}\n',
    }.items():
        status, headers, body = service.get(path)
        assert status == 200 and re.fullmatch(pattern, body)
        assert [headers[n] for n in HEADERS] == ["application/json", "no-store", str(len(body))]
        head = service.send(f"HEAD {path} HTTP/1.0\r\n\r\n".encode()).lower()
        assert re.fullmatch(f"(?s)http/1.. 200 ok\r\n.*content-length: {len(body)}\r\n.*\r\n", head)
        status, headers, body = service.request("OPTIONS", path)
        assert (status, set(headers["Allow"].split(", ")), body) == (200, METHODS, "")
    for host in ["127.0.0.1", "::1"][: 1 + socket.has_dualstack_ipv6()]:
        assert " 200 OK\r\n" in service.send(b"\r\n" + HEALTH, host)  # after an empty line, too


def test_errors_are_json_and_reveal_nothing(service, cursor):
    cases = (404, "/health/"), (404, "/api//usercount"), (405, "/health"), (500, "/api/usercount")
    with cursor.selecting("2 AS total_users, 'x' AS last_updated"):
        for status, path in cases:
            method = "POST" if status == 405 else "GET"
            answered, headers, body = service.request(method, path, b"x" * 500_000)
            error = f'"statusCode": {status}, "error": "{HTTPStatus(status).phrase}", "message"'
            assert answered == status and re.fullmatch(f'{{{error}: "[^"\n]+"}}\n', body)
            assert not re.search("Traceback|str|SELECT|user_stats|postgres|127", body)
            assert [headers[n] for n in HEADERS] == ["application/json", "no-store", str(len(body))]
            assert set(headers.get("Allow", "").split(", ")) == (METHODS if status == 405 else {""})
    assert "AttributeError" in service.log.read_text()


def test_requests_share_a_read_but_never_an_older_one(service, cursor):
    cursor.execute("DROP SEQUENCE IF EXISTS reads; CREATE SEQUENCE reads")
    sleep = "*, pg_sleep(CASE nextval('reads') WHEN 1 THEN 1.5 ELSE 0 END)::text"
    with cursor.selecting(sleep), ExitStack() as stack:
        first, *others = [stack.enter_context(closing(service.connect())) for _ in range(31)]
        first.request("GET", "/api/usercount")
        wait_until(lambda: cursor.value("SELECT is_called FROM reads"))
        cursor.execute(ADD_USERS, (1, 1))  # after the first read began, before the others arrive
        for number, other in enumerate(others):
            other.request("GET", "/api/usercount" if number % 2 else "//api/usercount")
        counts = [json.load(each.getresponse())["totalUsers"] for each in (first, *others)]
    assert (counts, cursor.value("SELECT last_value FROM reads")) == ([0] + [1] * 30, 2)


def test_is_never_stale_under_load(service, cursor):
    with cursor.selecting("*, pg_sleep(0.005)::text"), in_background(*[service.count] * 4):
        for number in range(1, 201):  # while a read is almost always under way
            cursor.execute(ADD_USERS, (number, number))
            assert service.count() == number


def test_a_route_that_is_added_later_is_an_ordinary_one(service):
    def call(number):
        n, method = str(number), "POST" if number % 2 else "GET"
        headers = {"X-N": n, "Content-Type": "application/json"}
        body = service.request(method, f"/hello?n={n}", json.dumps([n]), headers)[2]
        return json.loads(body) == [method, n, n, [n]]

    with ThreadPoolExecutor(20) as threads, in_background(service.count):
        assert all(threads.map(call, range(200)))


def test_logs_slow_queries_once_and_each_read_in_development(start, service, cursor):
    options = {"server": service.server, "APP_ENV": "development"}
    with cursor.selecting("*, pg_sleep(0.15)::text"), start(service.database, **options) as verbose:
        assert [verbose.count(), verbose.count(), service.count()] == [0] * 3
    log = verbose.log.read_text()
    assert len(re.findall(r"\[WARNING\] Slow query: \d{3,4} ms\n", log)) == 1
    assert len(re.findall(r"\[DEBUG\] Read the count in \d{3,4}\.\d ms\n", log)) == 2
    assert "Read the count" not in service.log.read_text()


def test_no_client_changes_what_another_gets_and_idle_ones_stay_connected(service, cursor):
    generator, before = random.Random(1), len(service.log.read_text())
    cursor.execute(ADD_USERS, (1, 42))

    def attack(request):
        mutated = bytearray(request[:300])
        position = generator.randrange(len(mutated))
        mutated[position : position + generator.randrange(9)] = generator.randbytes(3)
        with suppress(TimeoutError):
            service.send(generator.choice([request, bytes(mutated)]), seconds=0.1)

    with cursor.selecting("*, pg_sleep(0.01)::text"), closing(service.connect()) as idle:
        status, headers, body = service.get()
        assert (status, json.loads(body)["totalUsers"]) == (200, 42)
        with in_background(*[partial(attack, request) for request in HOSTILE_REQUESTS]):
            for seconds in (5.5, 0):  # longer than most clients' polling intervals
                idle.request("GET", "/health")
                assert idle.getresponse().read()
                ends_at = time.monotonic() + seconds
                while time.monotonic() < ends_at:
                    answered, other_headers, other_body = service.get()
                    assert (answered, set(other_headers), other_body) == (200, set(headers), body)
    assert "Traceback" not in service.log.read_text()[before:]


def test_the_application_is_strict_wsgi():
    environ = create_environ("/health", method="HEAD")
    body, status, _ = run_wsgi_app(validator(usercount.app), environ, buffered=True)
    assert body == [] and status in ("200 OK", "503 SERVICE UNAVAILABLE")  # whatever DB_HOST is


@pytest.mark.parametrize("worker", ["gevent", "gthread --threads=64"])
def test_gunicorns_options_have_their_effect(start, template, worker):
    code = (HERE / "gunicorn.conf.py").read_text()
    assert not re.search(r"\b(def|class|lambda)\b", code) and "\nkeepalive = 75 " in code
    options = "--keep-alive=2 --limit-request-line=40 --max-requests=9 --access-logfile=-"
    options += f" --proxy-protocol --worker-class={worker}"
    with start(template, GUNICORN_CMD_ARGS=options) as service:
        proxied = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + HEALTH.replace(b"close", b"")
        service.send(proxied)  # is closed after 2 s
        assert "too large" in service.send(HEALTH.replace(b"h ", b"h" * 40 + b" "))
        log = rf"{worker.split()[0]}\n(.|\n)*^192\.0\.2\.1 .* 200 (.|\n)*Autorestarting"
        wait_until(lambda: service.count() == 0 and re.search(log, service.log.read_text(), re.M))
        assert {status for status, _, _ in service.get_at_once()} == {200}


def test_reloads_at_sighup_and_ends_silently_at_ctrl_c(start, template, tmp_path):
    for name in ("usercount.py", "gunicorn.conf.py"):
        (tmp_path / name).write_text((HERE / name).read_text())
    (tmp_path / ".env").write_text("WEB_CONCURRENCY=2\nAPP_ENV=production\n")
    with start(template, code=tmp_path, APP_ENV="development") as service:

        def are_both_ready():
            service.get_at_once()
            log, workers = service.log.read_text(), psutil.Process(service.process.pid).children()
            return [f"[{worker.pid}] [DEBUG] Read" in log for worker in workers] == [True, True]

        wait_until(are_both_ready)
        code = (tmp_path / "usercount.py").read_text().replace('"totalUsers"', '"users"')
        (tmp_path / "usercount.py").write_text(code)
        with in_background(service.get) as [responses]:
            service.process.send_signal(signal.SIGHUP)
            wait_until(lambda: responses and '"users": 0' in responses[-1][2])
        assert {status for status, _, _ in responses} == {200}
        wait_until(are_both_ready)
        time.sleep(1)  # until gunicorn's master waits for signals again
        service.kill(signal.SIGINT)
    assert "Traceback" not in service.log.read_text()
