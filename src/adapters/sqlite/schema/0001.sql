CREATE TABLE log (epoch TEXT NOT NULL);

CREATE TABLE users (
    id INTEGER PRIMARY KEY,
    user_id TEXT NOT NULL UNIQUE,
    credit INTEGER,                     -- NULL: no balance has been kept
    head INTEGER NOT NULL,
    floor INTEGER NOT NULL,
    floor_id INTEGER NOT NULL
);

CREATE TABLE generations (
    id INTEGER PRIMARY KEY,             -- in order of their starts
    generation_id TEXT NOT NULL UNIQUE,
    user INTEGER NOT NULL REFERENCES users,
    kind TEXT NOT NULL,
    order_json BLOB NOT NULL,
    idempotency_key TEXT,
    fingerprint TEXT NOT NULL,
    reserved INTEGER NOT NULL,          -- whether its start took a credit, which a failure gives back
    first_position INTEGER NOT NULL,
    end_position INTEGER,               -- this and the next two: NULL while it runs
    ended_at INTEGER,                   -- microseconds since 1970
    end_event INTEGER,                  -- events.id, and so in order of the ends
    deleted INTEGER NOT NULL DEFAULT 0, -- nothing but its places is left
    undelivered INTEGER NOT NULL DEFAULT 0
);
CREATE UNIQUE INDEX generation_of_key ON generations (user, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX listed_generations ON generations (user, first_position) WHERE deleted = 0;
CREATE INDEX active_generations ON generations (user, first_position) WHERE end_position IS NULL;
CREATE INDEX deleted_generations ON generations (user, end_position, first_position) WHERE deleted = 1;
CREATE INDEX ended_generations ON generations (ended_at, end_event) WHERE ended_at IS NOT NULL;
CREATE INDEX undelivered_generations ON generations (end_event) WHERE undelivered = 1;

CREATE TABLE events (
    id INTEGER PRIMARY KEY,             -- in order of the appends
    user INTEGER NOT NULL,
    position INTEGER NOT NULL,
    generation INTEGER NOT NULL REFERENCES generations ON DELETE CASCADE,
    sequence INTEGER NOT NULL,
    event_id INTEGER NOT NULL,
    name TEXT NOT NULL,
    event BLOB                          -- NULL: deleted, and the place is left
);
CREATE UNIQUE INDEX event_at_position ON events (user, position);
CREATE UNIQUE INDEX event_of_sequence ON events (generation, sequence);

CREATE TABLE grants (
    user INTEGER NOT NULL REFERENCES users,
    idempotency_key TEXT NOT NULL,
    amount INTEGER NOT NULL,
    credit INTEGER NOT NULL,
    until INTEGER NOT NULL,             -- microseconds since 1970
    PRIMARY KEY (user, idempotency_key)
) WITHOUT ROWID;
CREATE INDEX expiring_grants ON grants (until);

CREATE TABLE sessions (
    id INTEGER PRIMARY KEY,             -- in order of their last save
    pid TEXT NOT NULL UNIQUE,
    user_id TEXT NOT NULL,
    expires_at INTEGER,                 -- microseconds since 1970, as is touched_at
    service INTEGER NOT NULL,
    live INTEGER NOT NULL,
    event_id INTEGER NOT NULL,
    seen INTEGER NOT NULL,
    head INTEGER NOT NULL,
    tag TEXT,
    touched_at INTEGER NOT NULL
);
CREATE INDEX sessions_of_user ON sessions (user_id, touched_at);
CREATE INDEX expiring_sessions ON sessions (touched_at);
