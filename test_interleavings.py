"""The count under any interleaving of sessions: hypothesis plays a model against PostgreSQL.

Three sessions take turns, and hypothesis chooses who does what next: begin in any isolation level,
set savepoints, sign up users, delete, merge, cascade, TRUNCATE, recalculate, commit, prepare, be
killed or reset, forge the id of its row, rename a table, run schema.sql, move the counter, …

The model is small: how many users each of two tables has, as committed, and how many each open or
prepared transaction adds, with a copy for each savepoint. After each step it asserts that
- what is committed has the same total_users and number of rows as the model has; each transaction
  that is watched has the same total_users and number of rows, whatever its snapshot is;
- last_updated has not gone backwards;
- no sign-up has waited or failed, but for a TRUNCATE of the table or for a transaction that its own
  session has prepared; and no session has more rows than it needs. In the end, all are folded.

As sessions take turns, one that waits for a lock waits in vain: lock_timeout makes it an error, and
the model knows when to expect it. hypothesis prints the shortest steps to a failure. A seed always
takes the same steps; HYPOTHESIS_PROFILE=thorough takes many seeds, at random.
"""

import itertools
import os
import secrets
from collections import Counter
from contextlib import ExitStack
from functools import partial

import hypothesis
import pytest
from hypothesis import stateful
from hypothesis import strategies as st
from psycopg2 import errors
from psycopg2.extensions import TRANSACTION_STATUS_INERROR

from conftest import ISOLATION_LEVELS, RECALCULATE, SCHEMA, open_cursor, wait_until

IS_THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"
SEEDS = [secrets.randbits(32) for _ in range(300)] if IS_THOROUGH else range(12)
SEARCH = hypothesis.settings(  # later examples would only vary earlier ones
    max_examples=10, deadline=None, database=None, suppress_health_check=[*hypothesis.HealthCheck]
)
SET_UP = SCHEMA.replace("'5s'", "'10ms'")
WAITED = errors.LockNotAvailable, errors.SerializationFailure
NO_PREPARED = errors.ObjectNotInPrerequisiteState  # max_prepared_transactions = 0
REFUSED = *WAITED, errors.UniqueViolation, errors.ActiveSqlTransaction, NO_PREPARED
CREATE_TABLE = """CREATE TABLE {} (LIKE user_list INCLUDING ALL,
    team int REFERENCES teams ON DELETE CASCADE) WITH (autovacuum_enabled = off)""".format
ADD = "INSERT INTO {table} (username, email) "
ADD_TAKEN = ADD + "VALUES ('taken', {n})"
TRIGGERS = "SELECT set_config('session_replication_role', '{}', true); ".format
CHANGES = {  # statements, and the users that each adds, given the number of rows it reports
    ADD_TAKEN: int,
    ADD_TAKEN + " ON CONFLICT DO NOTHING": int,
    f"WITH upserted AS ({ADD_TAKEN} ON CONFLICT (username) DO UPDATE SET email = excluded.email"
    " RETURNING xmax = 0 AS is_new) SELECT FROM upserted WHERE is_new": int,
    "MERGE INTO {table} AS t USING (SELECT id FROM {table} WHERE id % 3 = 0 UNION SELECT NULL) AS s"
    " ON t.id = s.id WHEN MATCHED THEN DELETE"
    " WHEN NOT MATCHED THEN INSERT (username, email) VALUES ({n}, {n})": lambda rows: 2 - rows,
    "INSERT INTO teams VALUES ({n}); INSERT INTO {table} (username, email, team)"
    " VALUES ({n}, {n}, {n}); DELETE FROM teams WHERE id = {n}": lambda rows: 0,
    "DELETE FROM {table} WHERE id % 3 = {n} % 3": lambda rows: -rows,
    RECALCULATE: lambda rows: 0,
    TRIGGERS("replica") + ADD + "VALUES ({n}, {n}); " + TRIGGERS("origin") + RECALCULATE: int,
}
ACTIONS = [  # methods and arguments, repeated to be chosen more often
    *itertools.product(["begin"], ISOLATION_LEVELS * 2, [True, False, False]),
    *itertools.product(["end"], ["COMMIT", "COMMIT", "ROLLBACK"] * 2),
    *itertools.product(["sign_up"], [False, False, False, True], [1, 2, 2, 150]),
    *itertools.product(["change"], CHANGES),
    *itertools.product(["end_savepoint"], ["RELEASE s", "ROLLBACK TO s; RELEASE s"]),
    *itertools.product(["end_prepared"], ["COMMIT PREPARED", "ROLLBACK PREPARED"]),
    *itertools.product(["truncate"], [(False,), (False, True)], [False, True]),
    *itertools.product(["reset"], ["RESET ALL", "DISCARD ALL"] * 2),
    *itertools.product(["reset"], ["SET usercount.row = 0", "SET usercount.row = {}"]),
    *itertools.product(["set_up", "rename"], [False, True]),
    *itertools.product(["replace"], [True, False] * 2),
    *[("prepare",), ("look",)] * 3,
]
OPTIONAL = ["change", "look", "prepare", "rename", "replace", "reset", "set_up", "truncate"]


class Session:
    """A cursor, and what the model knows of its session and of its open transaction."""

    def __init__(self, cursor):
        self.cursor, self.pid = cursor, cursor.connection.info.backend_pid
        self.max_rows = 1  # in usercount.counts
        self.has_prepared = False  # a transaction that its row may have to wait for
        self.obstacles = ["AccessExclusiveLock"]  # locks of others that its sign-ups may wait for
        self.end()

    def end(self):
        self.added = []  # empty outside a transaction; a further copy for each savepoint
        self.isolation, self.is_watched, self.has_read = "READ COMMITTED", False, False
        self.is_outdated = False  # whether its snapshot is older than a move of the counter


class Interleaving(stateful.RuleBasedStateMachine):
    """Three sessions, one that observes what they commit, and the model."""

    def __init__(self, params, database):
        super().__init__()
        self.params, self.database = params | {"options": "-c lock_timeout=10ms"}, database
        self.connections = ExitStack()
        *self.sessions, self.observer = [Session(self.connect()) for _ in range(4)]
        self.cursor, self.names = self.observer.cursor, ["users", "members"]
        self.cursor.execute("CREATE TABLE teams (id int PRIMARY KEY)")
        self.cursor.execute(";".join(map(CREATE_TABLE, self.names)))
        self.cursor.execute(f"SET LOCAL usercount.user_table = users; {SET_UP}")
        self.cursor.execute("ALTER TABLE usercount.counts SET (autovacuum_enabled = off)")
        self.cursor.execute("TRUNCATE usercount.counts RESTART IDENTITY")
        self.last_updated = self.cursor.value(f"{RECALCULATE}; SELECT last_updated FROM user_stats")
        self.counted, self.users = 0, Counter()  # by the index in self.names
        self.prepared, self.numbers, self.last_row = {}, itertools.count(1), 0

    def connect(self):
        return self.connections.enter_context(open_cursor(self.params, self.database))

    def disconnect(self, *sessions):
        for session in sessions:
            session.cursor.connection.close()
        processes = "SELECT FROM pg_stat_activity WHERE pid = ANY (%s)"
        wait_until(lambda: not self.cursor.rows(processes, [[each.pid for each in sessions]]))

    def is_locked(self, table, session):
        """Whether another session's transaction has so locked the table or the counter."""
        return self.cursor.value(
            "SELECT count(*) > 0 FROM pg_locks WHERE mode = ANY (%s) AND pid IS DISTINCT FROM %s"
            " AND relation IN (%s::regclass, 'usercount.counts'::regclass)"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            [session.obstacles, session.pid, self.names[table]],
        )

    def conflicts(self, session):
        """The errors that SERIALIZABLE may raise: none unless it or a prepared one has read."""
        is_exposed = session.has_read or "SERIALIZABLE" in dict(self.prepared.values())
        return WAITED if session.isolation == "SERIALIZABLE" and is_exposed else ()

    def attempt(self, session, expected, sql):
        """Return whether it succeeded; after an expected error, roll back to the last savepoint."""
        try:
            session.cursor.execute(sql)
            return True
        except expected:
            status = session.cursor.connection.info.transaction_status
        if status == TRANSACTION_STATUS_INERROR and session.added[1:]:
            session.cursor.execute("ROLLBACK TO s")
            session.added[-1] = Counter(session.added[-2])
        else:
            session.cursor.execute("ROLLBACK")
            session.end()
        return False

    def add(self, session, table, users):
        (session.added[-1] if session.added else self.users)[table] += users
        if session.isolation != "READ COMMITTED":
            session.max_rows += 3  # its moves and first writes may leave their rows behind

    @stateful.initialize(
        omitted=st.sets(st.sampled_from(OPTIONAL)),
        levels=st.sets(st.sampled_from(ISOLATION_LEVELS), max_size=2),
    )
    def choose(self, omitted, levels):  # so that what reveals a fault occurs together more often
        self.actions = [action for action in ACTIONS if (omitted | levels).isdisjoint(action)]

    @stateful.rule(
        number=st.sampled_from(range(3)),
        action=st.runner().flatmap(lambda state: st.sampled_from(state.actions)),
    )
    def act(self, number, action):  # one rule, as hypothesis omits some rules in each run
        getattr(self, action[0])(self.sessions[number], *action[1:])

    @stateful.invariant()
    def every_snapshot_is_exact(self):
        for session in self.sessions:
            if session.is_watched:
                self.look(session)
        if self.look(self.observer):
            assert self.observer.stats[0] == self.users[self.counted]
            assert self.observer.stats[1] >= self.last_updated
            self.last_updated = self.observer.stats[1]

    def look(self, session):
        session.has_read = True
        can_read = not (session.is_outdated or self.is_locked(self.counted, session))
        sql = f"SELECT *, (SELECT count(*) FROM {self.names[self.counted]}) FROM user_stats"
        if can_read and self.attempt(session, self.conflicts(session), sql):
            [(row_id, *session.stats, listed)] = session.cursor
            assert (row_id, session.stats[0]) == (1, listed)
            return True

    def begin(self, session, isolation, is_watched):
        """Begin a transaction, with a snapshot and a list of processes; within one, a savepoint."""
        if session.added:
            session.cursor.execute("SAVEPOINT s")
        else:
            list_processes = "SELECT FROM pg_stat_get_activity(NULL)"
            session.cursor.execute(f"BEGIN ISOLATION LEVEL {isolation}; {list_processes}")
            session.isolation, session.has_read = isolation, False
            session.is_watched = is_watched and isolation != "SERIALIZABLE"  # where reads conflict
        session.added.append(Counter(*session.added[-1:]))

    def end(self, session, how):
        if session.added and self.attempt(session, self.conflicts(session), how):
            self.users.update(session.added[-1] if how == "COMMIT" else {})
            session.end()

    def prepare(self, session):
        name = f"{self.database}-{next(self.numbers)}"
        if session.added and self.attempt(session, REFUSED, f"PREPARE TRANSACTION '{name}'"):
            self.prepared[name] = session.isolation, session.added[-1]
            session.has_prepared = True
            session.end()

    def end_prepared(self, session, how):
        if self.prepared:
            name, (_, users) = self.prepared.popitem()
            self.cursor.execute(f"{how} '{name}'")
            self.users.update(users if how == "COMMIT PREPARED" else {})

    def end_savepoint(self, session, how):
        if session.added[1:]:
            session.cursor.execute(how)
            session.added.pop(-2 if how == "RELEASE s" else -1)

    def sign_up(self, session, is_other, number):
        """Add users that no other session refers to, which must neither wait nor fail."""
        table = self.counted ^ is_other
        may_wait = session.has_prepared or self.is_locked(table, session)
        expected = WAITED if may_wait else self.conflicts(session)
        add, n = ADD.format(table=self.names[table]), next(self.numbers) * 1000
        sql = f"{add}SELECT n, n FROM generate_series({n}, {n + number - 1}) AS n"
        if number == 150:  # INSERTs: after 64 of them the row gets a new id
            add += "VALUES (n, n)" if session.added or expected else "VALUES (n, n); COMMIT"
            sql = f"DO $$ BEGIN FOR n IN {n}..{n + 149} LOOP {add}; END LOOP; END $$"
        if self.attempt(session, expected, sql):
            self.add(session, table, number)
            row = session.cursor.value("SELECT current_setting('usercount.row', true)")
            self.last_row = max(self.last_row, int(row or 0))
            if not (is_other or session.has_prepared or session.isolation == "SERIALIZABLE"):
                own = "SELECT count(*) FROM usercount.counts WHERE pid = pg_backend_pid()"
                assert 1 <= session.cursor.value(own) <= session.max_rows

    def change(self, session, change):
        session.has_read, name = True, self.names[self.counted]
        if self.attempt(session, REFUSED, change.format(table=name, n=next(self.numbers))):
            self.add(session, self.counted, CHANGES[change](session.cursor.rowcount))

    def truncate(self, session, others, with_counter):
        session.has_read, tables = True, [self.counted ^ is_other for is_other in others]
        names = [self.names[table] for table in tables] + ["usercount.counts"] * with_counter
        if self.attempt(session, WAITED, f"TRUNCATE {', '.join(names)}"):
            for table in tables:
                added = session.added[-1][table] if session.added else 0
                self.add(session, table, -self.users[table] - added)

    def reset(self, session, how):
        """Lose the id of the row, or forge it: an own older one, another session's, or 0."""
        if not session.added or how != "DISCARD ALL":
            session.cursor.execute(how.format(self.last_row // 2))
        if how.startswith("SET"):
            session.max_rows += 1
            session.obstacles.append("ShareUpdateExclusiveLock")  # of a recalculation that folds it

    def set_up(self, session, moves):
        """Run schema.sql again, and move the counter to the other table if told to."""
        table = self.counted ^ moves
        sql = f"SET LOCAL usercount.user_table = '{self.names[table] if moves else ''}'; {SET_UP}"
        if not session.added and self.attempt(session, WAITED, sql) and moves:
            self.counted = table
            for each in self.sessions:  # old snapshots may show neither table's number from now on
                each.is_outdated = each.isolation != "READ COMMITTED"

    def rename(self, session, is_other):
        table = self.counted ^ is_other
        sql = f"ALTER TABLE {self.names[table]} RENAME TO {self.names[table]}_"
        if not session.added and self.attempt(session, WAITED, sql):
            self.names[table] += "_"

    def replace(self, session, is_killed):
        self.cursor.execute("SELECT pg_terminate_backend(%s) WHERE %s", [session.pid, is_killed])
        self.disconnect(session)
        self.sessions[self.sessions.index(session)] = Session(self.connect())

    def teardown(self):
        with self.connections:
            self.disconnect(*self.sessions)
            for name in self.prepared:
                self.cursor.execute(f"ROLLBACK PREPARED '{name}'")
            self.cursor.execute(ADD.format(table=self.names[self.counted]) + "VALUES ('0', '0')")
            self.cursor.execute(f"DROP TABLE teams, {', '.join(self.names)} CASCADE")
            assert self.cursor.value("SELECT count(*) FROM usercount.counts") <= 2  # row 0, its own


@pytest.mark.parametrize("number", SEEDS)
def test_any_interleaving_of_sessions_is_exact(params, database, number):
    machine = partial(Interleaving, params, database)
    hypothesis.seed(number)(stateful.get_state_machine_test(machine, settings=SEARCH))()
