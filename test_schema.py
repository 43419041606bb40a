"""The counter, as schema.sql makes it.

At every snapshot, total_users is the number of rows in the counted table, whichever that is and
however it is written, and no session waits for another. The set-up adds three triggers to the table
and leaves it as it is otherwise. It can be repeated under load, runs nobody's code with the rights
of another role, and where it refuses, it changes nothing. What sessions do to one another is told
here by a few examples: test_interleavings.py searches for more.
"""

import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psycopg2
import pytest
from psycopg2.errors import InsufficientPrivilege

import conftest
from conftest import ADD_USERS, RECALCULATE, SCHEMA, in_background, running_cluster, wait_until

PATIENT = SCHEMA.replace("'5s'", "'60s'")
LAST_UPDATED = "SELECT last_updated FROM user_stats"
UNINSTALL = "DROP SCHEMA usercount CASCADE; DROP FUNCTION recalculate_user_count()"
DELETE = "DELETE FROM user_list WHERE username = '%s'"
TRUNCATE = "TRUNCATE user_list"
ENABLE = "ALTER TABLE user_list ENABLE TRIGGER USER"
BYPASS = f"BEGIN; {ENABLE.replace('EN', 'DIS', 1)}; {ADD_USERS % (1, 3)}"
DRIFT = "UPDATE usercount.counts SET change = change + 7 WHERE id = 0"
CATALOG = " UNION ".join(  # all but PostgreSQL's own, without what changes by itself
    f"SELECT (to_jsonb(o) - '{{relhastriggers,relpages,reltuples,relallvisible,relallfrozen,"
    f"relfrozenxid,relminmxid}}'::text[])::text FROM pg_{catalog} AS o"
    f" WHERE {'attrelid' if catalog == 'attribute' else 'oid'} >= 16384"
    for catalog in ("attribute", "class", "constraint", "namespace", "policy", "proc", "trigger")
)


def set_up(cursor, table="", schema=PATIENT):
    cursor.execute(f"SET LOCAL usercount.user_table = '{table}'; {schema}")


def assert_refused(cursor, match, *arguments):
    """The first line of the set-up's error says why, and nothing has changed."""
    before = set(cursor.column(CATALOG))
    with pytest.raises(psycopg2.Error, match=rf"\A.*({match})"):
        set_up(cursor, *arguments)
    cursor.execute("ROLLBACK")
    assert set(cursor.column(CATALOG)) == before


def assert_exact(cursor, expected, table="user_list"):
    """The count is the number of rows, and a recalculation finds nothing to repair."""
    query = f"SELECT *, (SELECT count(*) FROM {table}) FROM user_stats"  # of one snapshot
    stats = cursor.row(query)
    assert stats == (1, expected, stats[2], expected)
    assert cursor.value(RECALCULATE) == expected
    assert cursor.row(query) == stats


WRITES = {  # what is done to the users 1, 2 and 3, and how many remain
    ADD_USERS % (4, 4): 4,
    ADD_USERS % (4, 3): 3,
    ADD_USERS % (3, 5) + " ON CONFLICT DO NOTHING": 5,
    ADD_USERS % (2, 4) + " ON CONFLICT (username) DO UPDATE SET email = excluded.email || '@'": 4,
    "MERGE INTO user_list USING (VALUES ('3'), ('4'), ('5')) AS v (n) ON username = n"
    " WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT (username, email) VALUES (n, n)": 4,
    f"WITH a AS ({ADD_USERS % (4, 5)}) {ADD_USERS % (6, 6)}": 6,
    "COPY user_list (username, email) FROM PROGRAM 'echo x,x; echo y,y' (FORMAT csv)": 5,
    "UPDATE user_list SET email = email || '@'": 3,
    "DELETE FROM user_list WHERE username <> '2'": 1,
    DELETE % 9: 3,
    "CREATE TABLE teams (id int PRIMARY KEY); INSERT INTO teams VALUES (1), (2);"
    "ALTER TABLE user_list ADD team int REFERENCES teams ON DELETE CASCADE;"
    "UPDATE user_list SET team = 1 WHERE username < '3'; DELETE FROM teams WHERE id = 1": 1,
    TRUNCATE: 0,
    f"TRUNCATE user_list RESTART IDENTITY CASCADE; {ADD_USERS % (8, 9)}": 2,
    f"TRUNCATE usercount.counts, user_list RESTART IDENTITY; {ADD_USERS % (8, 9)}": 2,
    f"BEGIN; {ADD_USERS % (4, 5)}; SAVEPOINT s; {DELETE % 1}; ROLLBACK TO s; COMMIT": 5,
    f"BEGIN; {ADD_USERS % (4, 9)}; TRUNCATE user_list; ROLLBACK": 3,
    "ALTER TABLE user_list RENAME TO accounts; CREATE VIEW user_list AS SELECT * FROM accounts;"
    f"{ADD_USERS % (4, 6)}; {ADD_USERS.replace('user_list', 'accounts') % (7, 9)}; {DELETE % 4}": 8,
    "ALTER TABLE user_list DROP CONSTRAINT user_list_username_key;"
    f"{ADD_USERS % (4, 1_000_000)}; DELETE FROM user_list WHERE id % 2 = 0": 500_000,
}


@pytest.mark.parametrize("write, expected", WRITES.items())
def test_every_kind_of_write_is_counted(cursor, database, write, expected):
    cursor.execute(ADD_USERS, (1, 3))
    before = cursor.rows("SELECT ctid, * FROM usercount.counts"), cursor.value(LAST_UPDATED)
    cursor.execute(write)
    after = cursor.rows("SELECT ctid, * FROM usercount.counts"), cursor.value(LAST_UPDATED)
    assert after == before if expected == 3 else after[1] > before[1]  # no change is not written
    assert_exact(cursor, expected)


def test_a_snapshot_older_than_a_truncate_is_exact(connect, database):
    reader, writer = connect(), connect()
    writer.execute(ADD_USERS, (1, 3))
    reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")  # a snapshot, and no lock
    before = writer.row("SELECT total_users - 3, 0, last_updated FROM user_stats")
    writer.execute("TRUNCATE user_list")
    stats = "SELECT total_users, (SELECT count(*) FROM user_list), last_updated FROM user_stats"
    assert before < reader.row(stats) < (0, 1)


def test_last_updated_never_goes_backwards(cursor, database):
    add_row = "INSERT INTO usercount.counts (pid, change) VALUES (2000000000, 0); COMMIT"
    repair, fold = f"{DRIFT}; {RECALCULATE}", f"{add_row}; {RECALCULATE}"
    writes = ("pid > 0", DELETE % 1), ("id = 0", repair), ("id = 0", fold), ("true", TRUNCATE)
    for row, write in writes:
        cursor.execute(ADD_USERS, (1, 1))
        later = f"now() + CASE WHEN {row} THEN interval '1 hour' ELSE '0' END"
        cursor.execute(f"UPDATE usercount.counts SET last_updated = {later}")  # the clock was wrong
        before = cursor.value(LAST_UPDATED)
        cursor.execute(f"{write}; {DELETE % 1}")
        assert cursor.value(LAST_UPDATED) == before


@pytest.mark.parametrize("isolation", conftest.ISOLATION_LEVELS)
def test_new_sessions_fold_rows_of_terminated_ones_without_waiting(connect, database, isolation):
    """None newer than the transaction, as that is how old the list of processes may be."""
    cursor, living, writer, late = (connect() for _ in range(4))
    living.execute("SET lock_timeout = '1s'; " + ADD_USERS, (1, 1))
    cursor.execute(
        "INSERT INTO usercount.counts (pid, change, last_updated)"
        " VALUES (2000000000, 5, now()), (2000000001, -5, now() + '1 hour')"
    )
    late.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
    writer.execute(f"BEGIN ISOLATION LEVEL {isolation}; " + ADD_USERS, (2, 2))
    cursor.execute("BEGIN; SELECT FROM usercount.counts WHERE pid > 0 FOR UPDATE SKIP LOCKED")
    living.execute(f"RESET usercount.row; {ADD_USERS}; {RECALCULATE}", (3, 3))
    writer.execute("COMMIT")
    cursor.execute("COMMIT; SELECT pid FROM usercount.counts")
    pids = {0, *[each.connection.info.backend_pid for each in (living, writer)], 2000000001}
    kept = {2000000000} if isolation == "SERIALIZABLE" else set()  # which reads no row
    assert {pid for (pid,) in cursor} == pids | kept
    late.execute(ADD_USERS + "; COMMIT", (4, 4))  # although it still sees what has been folded
    assert_exact(cursor, 4)


@pytest.mark.parametrize("reset", ["RESET ALL", "DISCARD ALL"])
def test_a_session_finds_its_row_after_a_reset(connect, database, reset):
    """As pools reset it after each use. It reads two or three rows, also under a held snapshot."""
    writer, reader = connect(), connect()
    reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
    for n in range(1000):
        writer.execute(ADD_USERS, (n, n))
        writer.execute(reset)
    writer.execute("SELECT pg_stat_force_next_flush()")
    scanned, by_index = writer.row(
        "SELECT seq_tup_read, idx_tup_read FROM pg_stat_all_tables"
        " JOIN pg_stat_all_indexes USING (relid) WHERE indexrelname = 'counts_pkey'"
    )
    assert (scanned, by_index < 3000) == (0, True)
    # Locked and updated by the same subtransaction: otherwise each sign-up needs a MultiXact.
    rows = writer.rows("SELECT change, writes, xmax = xmin FROM usercount.counts WHERE pid > 0")
    assert rows == [(1000, 999 % 64 + 1, True)]


def test_the_count_survives_a_crash_of_the_server():
    with running_cluster() as cluster:
        with conftest.open_cursor(cluster.params) as cursor:
            set_up(cursor)
            cursor.execute(ADD_USERS, (1, 1000))
            cursor.execute("BEGIN; " + ADD_USERS, (1001, 2000))
            cluster.kill()
        cluster.start()
        with conftest.open_cursor(cluster.params) as cursor:
            assert_exact(cursor, 1000)


def test_a_recalculation_repairs_what_bypassed_the_triggers(cursor, database):
    cursor.execute(
        f"{BYPASS}; {ENABLE}; COMMIT; INSERT INTO usercount.counts (pid, change) VALUES"
        " (2000000000, 4), (2000000001, 8), (pg_backend_pid(), 2), (pg_backend_pid(), -2)"
    )
    for isolation in conftest.ISOLATION_LEVELS[1:]:  # might be wrong if user_list was rewritten
        with pytest.raises(psycopg2.Error, match="needs READ COMMITTED"):
            cursor.execute(f"BEGIN ISOLATION LEVEL {isolation}; {RECALCULATE}")
        cursor.execute("ROLLBACK")
    assert cursor.row("SELECT total_users, recalculate_user_count() FROM user_stats") == (12, 3)
    assert cursor.column("SELECT change FROM usercount.counts ORDER BY pid") == [5, -2]
    assert_exact(cursor, 3)


LOCK_USERS = "BEGIN; LOCK TABLE user_list IN ACCESS EXCLUSIVE MODE"
STRICT = "SET default_transaction_isolation = serializable; SET default_transaction_read_only = on"
SLOW_COUNT = """CREATE OR REPLACE VIEW usercount.listed AS SELECT count(*) AS users
    FROM user_list, (SELECT pg_advisory_xact_lock(1) OFFSET 0) AS slow;
    COMMIT; BEGIN; SELECT pg_advisory_xact_lock(1)"""
WAITS = {  # what another session does, what waits for it, what the other one does then, the count
    "recalculations take turns": (f"{DRIFT}; COMMIT; BEGIN; {RECALCULATE}", RECALCULATE, "", 0),
    "recalculation locks the table first": (LOCK_USERS, RECALCULATE, TRUNCATE, 0),
    "set-up locks the table first": (LOCK_USERS, PATIENT, TRUNCATE, 0),
    "compared within one snapshot": (SLOW_COUNT, RECALCULATE, ADD_USERS % (1, 5), 5),
    "whatever the defaults are": (BYPASS, f"{STRICT}; COMMIT; {PATIENT}", ENABLE, 3),
}


@pytest.mark.parametrize("before, waiting, meanwhile, expected", WAITS.values(), ids=WAITS)
def test_what_has_waited_is_exact(connect, database, before, waiting, meanwhile, expected):
    other, cursor = connect(), connect()
    other.execute(before)
    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(cursor.execute, waiting)
        wait_until(other.has_lock_waiters)
        other.execute(meanwhile + "; COMMIT")
        done.result()
    assert_exact(other, expected)


def test_nothing_is_lost_under_load(connect, database):
    cursor, numbers = connect(), itertools.count(1)
    cursor.execute("CREATE TABLE members (LIKE user_list INCLUDING ALL)")

    def sign_up(writer, table, other):
        n = next(numbers)
        adds = [ADD_USERS.replace("user_list", each) % (n, n) for each in (table, other)]
        writer.execute(f"{'; '.join(adds)}; DELETE FROM {table} WHERE id % 3 = 0; RESET ALL")

    pairs = [("user_list", "members"), ("members", "user_list")] * 2
    running = [partial(sign_up, connect(), *pair) for pair in pairs]
    running += [partial(connect().execute, RECALCULATE), partial(set_up, connect())]
    with in_background(*running) as rounds:
        for table in ["members", "", "user_list", ""] * 5:
            before = sum(map(len, rounds))
            cursor.execute(DRIFT)
            set_up(cursor, table)
            cursor.execute(TRUNCATE)
            wait_until(lambda before=before: sum(map(len, rounds)) > before + 30)
    assert_exact(cursor, cursor.value("SELECT count(*) FROM user_list"))


TABLES = {  # each as it is written in SQL, and what creates it
    "members": "CREATE TABLE members (name text)",  # no key at all
    '"our people"."User"': """CREATE SCHEMA "our people"; CREATE TABLE "our people"."User"
        (name text PRIMARY KEY, "publicId" uuid DEFAULT gen_random_uuid())""",
    "app.users": """CREATE SCHEMA app; CREATE TABLE app.users (name text) PARTITION BY LIST (name);
        CREATE TABLE app.all_users PARTITION OF app.users DEFAULT""",
    "auth_user": """CREATE TABLE auth_user (id serial PRIMARY KEY, name text UNIQUE);
        ALTER TABLE auth_user ENABLE ROW LEVEL SECURITY;
        CREATE POLICY few ON auth_user USING (id = 1);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
        CREATE TRIGGER user_insert_trigger AFTER INSERT ON auth_user REFERENCING NEW TABLE AS
        changed_rows FOR EACH STATEMENT EXECUTE FUNCTION note()""",
}


@pytest.mark.parametrize("table", TABLES)
def test_any_table_is_counted_and_gets_three_triggers(cursor, empty_database, alice, table):
    cursor.execute(f"SET SESSION AUTHORIZATION {alice}; {TABLES[table]}")
    before = set(cursor.column(CATALOG))
    cursor.execute(f"INSERT INTO {table} (name) SELECT generate_series(1, 3)")
    for expected, name in (3, table), (4, ""):
        set_up(cursor, name)
        assert_exact(cursor, expected, table)
        cursor.execute(f"INSERT INTO {table} (name) VALUES ('x'), ({expected + 1})")
        cursor.execute(f"DELETE FROM {table} WHERE name = 'x'; UPDATE {table} SET name = name")
        assert_exact(cursor, expected + 1, table)
    triggers = "SELECT FROM pg_trigger WHERE tgname ~ '^usercount_' AND tgrelid = %s::regclass"
    assert len(cursor.rows(triggers, [table])) == 3
    assert before <= set(cursor.column(CATALOG))  # nothing has been altered
    cursor.execute(UNINSTALL)
    assert before == set(cursor.column(CATALOG))  # nothing else had been added


def test_the_owner_of_the_table_counts_all_its_rows_or_none(cursor, empty_database, alice):
    cursor.execute(f"SET SESSION AUTHORIZATION {alice}; CREATE TABLE members AS SELECT 1 AS n")
    set_up(cursor, "members")
    cursor.execute("ALTER TABLE members ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    assert_refused(cursor, "row-level security")
    cursor.execute("RESET SESSION AUTHORIZATION")  # for a superuser, too
    with pytest.raises(InsufficientPrivilege, match="row-level security"):
        cursor.execute("SELECT usercount.recalculate()")
    assert_refused(cursor, f"members belongs to {alice}", "members")


def test_the_counted_table_is_not_dropped_unnoticed(cursor, database):
    """As pandas' to_sql(if_exists="replace") drops it, or Sequelize's sync({force: true})."""
    cursor.execute(ADD_USERS, (1, 100))
    with pytest.raises(psycopg2.Error, match=r"cannot drop table user_list(.|\n)* user_stats"):
        cursor.execute("DROP TABLE user_list")
    cursor.execute("DROP TABLE user_list CASCADE")
    with pytest.raises(psycopg2.Error, match='relation "user_stats" does not exist'):
        cursor.execute(LAST_UPDATED)
    assert_refused(cursor, '"public.user_list" does not exist')  # nor is it created anew
    cursor.execute("CREATE TABLE user_list (username text, email text); " + ADD_USERS, (1, 20))
    set_up(cursor)
    assert_exact(cursor, 20)


REFUSED = {  # a name, which the error repeats, and what is there
    "nowhere": "SELECT",
    "user list": "SELECT",
    "a_view": "CREATE VIEW a_view AS SELECT 1 AS id",
    "public.fast": "CREATE UNLOGGED TABLE fast (n int)",
    "public.p": """CREATE TABLE p (n int) PARTITION BY LIST (n);
        CREATE UNLOGGED TABLE p1 PARTITION OF p DEFAULT""",
    "public.part": """CREATE TABLE p (n int) PARTITION BY LIST (n);
        CREATE TABLE part PARTITION OF p DEFAULT""",
    "user_list": "CREATE TABLE user_stats (id serial, total_users int)",
}


@pytest.mark.parametrize("table", REFUSED)
def test_what_cannot_be_counted_is_refused(cursor, empty_database, table):
    cursor.execute(REFUSED[table])
    assert_refused(cursor, f"{table}|user_stats is not this counter's", table)


def test_the_set_up_waits_for_no_reader_and_not_for_long(connect, database):
    """Otherwise sign-ups would queue behind it. Nor does it leave a setting behind."""
    cursor, other, settings = connect(), connect(), "SELECT name, setting FROM pg_settings"
    set_up(cursor)
    cursor.execute("SET usercount.user_table = user_list")
    before = cursor.rows(settings)
    other.execute("BEGIN; LOCK TABLE user_stats, usercount.listed IN ACCESS SHARE MODE")
    cursor.execute(SCHEMA)  # as beside pg_dump
    assert cursor.rows(settings) == before
    assert cursor.value("SELECT current_setting('usercount.user_table')") == "user_list"
    impatient = SCHEMA.replace("'5s'", "'10ms'")
    other.execute(ADD_USERS, (1, 1))
    assert_refused(cursor, "lock timeout", "user_list", impatient)


PRIVILEGES = """SELECT acl FROM (SELECT nspacl FROM pg_namespace WHERE nspname = 'usercount'
    UNION ALL SELECT relacl FROM pg_class WHERE relnamespace = 'usercount'::regnamespace
    UNION ALL SELECT coalesce(proacl, acldefault('f', proowner)) FROM pg_proc
    WHERE pronamespace = 'usercount'::regnamespace OR proname = 'recalculate_user_count'
    ) AS privileges (acl) WHERE cardinality(acl) > 1"""


@pytest.mark.parametrize("kinds", [[], ["TABLES", "SEQUENCES", "FUNCTIONS", "SCHEMAS"]])
def test_writers_need_rights_on_the_table_and_get_no_others(cursor, empty_database, alice, kinds):
    for kind in kinds:
        cursor.execute(f"ALTER DEFAULT PRIVILEGES GRANT ALL ON {kind} TO PUBLIC, {alice}")
    set_up(cursor)
    assert cursor.column(PRIVILEGES) == []
    cursor.execute(f"GRANT SELECT, INSERT, DELETE, TRUNCATE ON user_list TO {alice}")
    cursor.execute(f"SET SESSION AUTHORIZATION {alice}")
    cursor.execute(f"{ADD_USERS % (1, 5)}; {DELETE % 1}")
    for statement in (RECALCULATE, "SELECT FROM usercount.counts", "LOCK TABLE user_stats"):
        with pytest.raises(InsufficientPrivilege):
            cursor.execute(f"BEGIN; {statement}")
        cursor.execute("ROLLBACK")
    cursor.execute("RESET SESSION AUTHORIZATION")
    assert_exact(cursor, 4)


def test_every_part_has_to_belong_to_the_owner_of_the_table(cursor, database, alice):
    parts = "SCHEMA usercount, TABLE usercount.counts, VIEW usercount.listed, VIEW user_stats"
    functions = "FUNCTION usercount.claim_row, FUNCTION recalculate_user_count"
    for part in f"{parts}, {functions}".split(", "):
        cursor.execute(f"ALTER {part} OWNER TO {alice}")
        assert_refused(cursor, f"belongs to {alice}")
        cursor.execute(f"ALTER {part} OWNER TO CURRENT_USER")


TRAP = """CREATE SEQUENCE caught; GRANT ALL ON SEQUENCE caught TO PUBLIC;
    CREATE FUNCTION trap(bigint) RETURNS bigint LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN
        IF current_user <> $_$alice$_$ THEN PERFORM nextval('public.caught'::regclass); END IF;
        RETURN 1;
    END $$;
    CREATE FUNCTION trap(bigint, numeric) RETURNS bigint LANGUAGE sql AS 'SELECT public.trap(1)';
    CREATE OPERATOR - (FUNCTION = trap, LEFTARG = bigint, RIGHTARG = numeric);
    CREATE FUNCTION nextval(text) RETURNS bigint LANGUAGE sql AS 'SELECT public.trap(1)'"""
USERS = "CREATE TABLE user_list (id int, username text, email text)"
PLANTED = {  # what alice does while a superuser's set-up waits, on what the superuser had created
    "SELECT": USERS,
    "CREATE SCHEMA usercount": USERS,
    "CREATE VIEW user_stats AS SELECT trap(1) AS total_users": USERS,
    "CREATE FUNCTION recalculate_user_count() RETURNS bigint RETURN trap(1)": USERS,
    "CREATE INDEX ON user_list ((trap(1)))": USERS,
    "CREATE INDEX ON child ((trap(1)))": f"{USERS}; CREATE TABLE child () INHERITS (user_list)",
    "CREATE INDEX ON part ((trap(1)))": USERS
    + " PARTITION BY LIST (id); CREATE TABLE part PARTITION OF user_list DEFAULT",
}


@pytest.mark.parametrize("planted", PLANTED)
def test_nobodys_code_runs_with_the_rights_of_another_role(connect, empty_database, alice, planted):
    cursor, intruder, observer = connect(), connect(), connect()
    cursor.execute(f"{PLANTED[planted]}; GRANT INSERT ON user_list TO {alice}")
    for table in re.findall(r"INDEX ON (\w+)", planted):
        cursor.execute(f"ALTER TABLE {table} OWNER TO {alice}")
    intruder.execute(f"SET SESSION AUTHORIZATION {alice}; {TRAP.replace('alice', alice[1:-1])}")
    intruder.execute("BEGIN; " + ADD_USERS, (1, 1))
    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(set_up, cursor)
        wait_until(observer.has_lock_waiters)
        intruder.execute(planted + "; COMMIT")
    if planted == "SELECT":
        done.result()
        intruder.execute(ADD_USERS, (2, 9))
        cursor.execute("SELECT usercount.recalculate()")
    else:
        assert re.search(f"belongs? to (postgres|{alice})|not this counter", str(done.exception()))
    assert not observer.value("SELECT is_called FROM caught")
