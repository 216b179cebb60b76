-- The tables of the log, and the functions that nodes call. A released step is never changed: a function that has to
-- change gets a new version in its name, so that nodes of two adjacent versions can run together.

CREATE SCHEMA IF NOT EXISTS stagecast;

CREATE TABLE stagecast.log (
    epoch text NOT NULL,
    version integer NOT NULL,
    -- Known to all nodes and nobody else. Its 244 random bits come from the server, so that no output shows them.
    secret text NOT NULL DEFAULT gen_random_uuid()::text || gen_random_uuid()
);

CREATE TABLE stagecast.users (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    user_id text COLLATE "C" NOT NULL UNIQUE,
    credit bigint,                          -- NULL: no balance has been kept
    active integer NOT NULL DEFAULT 0,      -- unfinished generations
    head bigint NOT NULL DEFAULT 0,
    floor bigint NOT NULL DEFAULT 0,
    floor_id bigint NOT NULL,
    CHECK (credit >= 0)
) WITH (fillfactor = 70);

CREATE TABLE stagecast.generations (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    generation_id text COLLATE "C" NOT NULL UNIQUE,
    owner bigint NOT NULL,
    kind text NOT NULL,
    request_json bytea NOT NULL,
    idempotency_key text COLLATE "C",
    fingerprint text NOT NULL,
    external boolean NOT NULL,              -- the owner's own pipeline does the work
    reserved boolean NOT NULL,              -- whether its start took a credit, which a failure gives back
    free boolean NOT NULL,                  -- the work of its present stage costs nothing
    last integer NOT NULL,                  -- the sequence of its last event
    first_position bigint NOT NULL,
    end_position bigint,                    -- this and the next two: NULL while it runs
    ended_at timestamptz,
    end_event bigint,                       -- events.id
    code text,                              -- of its failure
    deleted boolean NOT NULL DEFAULT false, -- only its tombstones are left
    undelivered boolean NOT NULL DEFAULT false,
    claimed_by text,                        -- the node that delivers its end, and until when no other one does
    claimed_until timestamptz
) WITH (fillfactor = 70);
CREATE UNIQUE INDEX generation_of_key ON stagecast.generations (owner, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX listed_generations ON stagecast.generations (owner, first_position) WHERE NOT deleted;
CREATE INDEX active_generations ON stagecast.generations (owner, first_position) WHERE end_position IS NULL;
CREATE INDEX deleted_generations ON stagecast.generations (owner, end_position) WHERE deleted;
CREATE INDEX ended_generations ON stagecast.generations (ended_at, end_event) WHERE ended_at IS NOT NULL;
CREATE INDEX undelivered_generations ON stagecast.generations (end_event) WHERE undelivered;
CREATE INDEX generations_of_kind ON stagecast.generations (kind, id) WHERE NOT deleted;
CREATE INDEX failed_generations ON stagecast.generations (id) INCLUDE (code) WHERE code IS NOT NULL;
CREATE INDEX recent_failures ON stagecast.generations (ended_at) INCLUDE (code) WHERE code IS NOT NULL;

CREATE TABLE stagecast.events (
    -- Drawn in the order of the appends of one user; the transactions of several users may commit in another order.
    id bigint GENERATED ALWAYS AS IDENTITY (CACHE 1) PRIMARY KEY,
    owner bigint NOT NULL,
    position bigint NOT NULL,
    generation bigint NOT NULL,
    sequence integer NOT NULL,
    event_id bigint NOT NULL,
    name text NOT NULL,
    event bytea,                            -- NULL: a tombstone
    images jsonb                            -- the names of its pictures by field; NULL: it has none
) WITH (autovacuum_vacuum_scale_factor = 0.02);
CREATE UNIQUE INDEX event_at_position ON stagecast.events (owner, position);
CREATE UNIQUE INDEX event_of_sequence ON stagecast.events (generation, sequence);

CREATE TABLE stagecast.grants (
    owner bigint NOT NULL,
    idempotency_key text COLLATE "C" NOT NULL,
    amount bigint NOT NULL,
    credit bigint NOT NULL,
    until timestamptz NOT NULL,
    PRIMARY KEY (owner, idempotency_key)
);
CREATE INDEX expiring_grants ON stagecast.grants (until);

CREATE TABLE stagecast.sessions (
    pid text COLLATE "C" PRIMARY KEY,
    id bigint GENERATED ALWAYS AS IDENTITY, -- in order of their first save
    user_id text COLLATE "C" NOT NULL,
    expires_at timestamptz,
    service boolean NOT NULL,
    live bigint NOT NULL,
    event_id bigint NOT NULL,
    seen bigint NOT NULL,
    open_tombstones bigint[] NOT NULL,
    head bigint NOT NULL,
    tag text,
    touched_at timestamptz NOT NULL,
    holder text NOT NULL                    -- the node that saved it last
);
CREATE INDEX sessions_of_user ON stagecast.sessions (user_id, touched_at, id);
CREATE INDEX expiring_sessions ON stagecast.sessions (touched_at);

-- What was removed in the last hour, for the followers of all nodes, who read it as entries of the log.
CREATE TABLE stagecast.removals (
    id bigint PRIMARY KEY DEFAULT nextval('stagecast.events_id_seq'),
    event_id bigint NOT NULL DEFAULT (random() * 9e18)::bigint,
    user_id text NOT NULL,
    generation_ids text[] NOT NULL,         -- NULL in it: all that was stored of the user
    at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX removals_by_time ON stagecast.removals (at);

CREATE TABLE stagecast.nodes (
    id text PRIMARY KEY,
    address text NOT NULL,                  -- host:port at which other nodes reach it
    seen timestamptz NOT NULL,
    sockets integer NOT NULL DEFAULT 0,
    streams integer NOT NULL DEFAULT 0,
    webhook_gone boolean NOT NULL DEFAULT false     -- the receiver has told it that it wants no webhook any more
);

-- Sessions that a node held until another one resumed them: it closes their sockets.
CREATE TABLE stagecast.takeovers (
    node text NOT NULL REFERENCES stagecast.nodes ON DELETE CASCADE,
    pid text COLLATE "C" NOT NULL,
    PRIMARY KEY (node, pid)
);

-- What each user has used up of the limits. A crash of the server may empty the first two.
CREATE UNLOGGED TABLE stagecast.starts (
    user_id text COLLATE "C" NOT NULL,
    at timestamptz NOT NULL
);
CREATE INDEX starts_of_user ON stagecast.starts (user_id, at);
CREATE INDEX starts_by_time ON stagecast.starts (at);

CREATE UNLOGGED TABLE stagecast.devices (
    user_id text COLLATE "C" NOT NULL,
    node text NOT NULL,
    count integer NOT NULL,
    PRIMARY KEY (user_id, node)
);

CREATE TABLE stagecast.stored_images (
    generation_id text COLLATE "C" PRIMARY KEY,
    user_id text COLLATE "C" NOT NULL,
    size bigint NOT NULL                    -- bytes
);
CREATE INDEX stored_images_of_user ON stagecast.stored_images (user_id) INCLUDE (size);

-- Waiting in the line of work or of fetches, or held by a node. One that is held for fetching may wait for work on the
-- same node: then it has a holder, and waits. An unfinished generation without a row is external or abandoned.
CREATE TABLE stagecast.leases (
    generation_id text COLLATE "C" PRIMARY KEY,
    user_id text COLLATE "C" NOT NULL,
    fetching boolean NOT NULL,
    waiting boolean NOT NULL,
    turn bigint NOT NULL,                   -- the round in which its user is served
    ticket bigint GENERATED ALWAYS AS IDENTITY,
    holder text
);
CREATE INDEX waiting_leases ON stagecast.leases (turn, ticket) WHERE waiting;
CREATE INDEX leases_of_user ON stagecast.leases (user_id);

CREATE TABLE stagecast.chores (
    name text PRIMARY KEY,
    holder text NOT NULL,
    until timestamptz NOT NULL
);


-- `domain.append_rules.decide` in SQL: its order of checks, and what an accepted append stores. Inlined by its caller.
CREATE FUNCTION stagecast.decide_v1(
    known boolean, ended boolean, last integer, event_there bigint, begun text, begun_fingerprint text,
    unfinished integer, kept bigint, kept_reserved boolean,
    sequence integer, event_id bigint, begins boolean, fingerprint text, most_unfinished integer, change integer,
    late boolean, credits bigint
) RETURNS TABLE (outcome text, credit bigint, reserved boolean, shows_credit boolean) LANGUAGE sql IMMUTABLE AS $$
    SELECT
        CASE
            WHEN event_there = event_id THEN 'again'
            WHEN late THEN 'late'
            WHEN begins AND begun IS NOT NULL AND begun_fingerprint <> fingerprint THEN 'mismatch'
            WHEN begins AND begun IS NOT NULL THEN 'started'
            WHEN sequence <> last + 1 OR known = begins OR ended THEN 'conflict'
            WHEN begins AND unfinished >= most_unfinished THEN 'too_many'
            WHEN after.credit < 0 THEN 'no_credit'
            ELSE 'accepted'
        END,
        after.credit, after.reserved, change IS NOT NULL AND credits IS NOT NULL
    FROM (SELECT CASE WHEN begins THEN credits IS NOT NULL ELSE kept_reserved END AS reserved) AS work,
        LATERAL (
            SELECT work.reserved, coalesce(kept, credits) + CASE WHEN work.reserved THEN coalesce(change, 0) ELSE 0 END
        ) AS after (reserved, credit)
$$;


-- Appends at most one event per user. The lock on the user's row is the order of the feed. It is also taken before a
-- look for the append's own event, so that a retry has a commit of its own that waits for the standby. Locks are taken in
-- the order of users. Without `wait`, an append whose user is locked by another node is 'busy'. Nothing is raised for a
-- refusal, so no id is wasted. The plan is kept, and is one of index scans however small the tables are when it is made.
CREATE FUNCTION stagecast.append_v1(
    user_ids text[], zero_ids bigint[], generation_ids text[], sequences integer[], event_ids bigint[],
    contents bytea[], names text[], pictures text[], times timestamptz[], changes integer[], ends boolean[],
    frees boolean[], deadlines timestamptz[], kinds text[], orders bytea[], keys text[], fingerprints text[],
    limits integer[], externals boolean[], credits bigint, outbox boolean, wait boolean
) RETURNS TABLE (
    r_outcome text, r_position bigint, r_first bigint, r_end bigint, r_event bytea, r_images text, r_begun text
) LANGUAGE plpgsql SET lock_timeout = '1s' SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
DECLARE
    locked bigint[];
BEGIN
    INSERT INTO stagecast.users (user_id, floor_id)
        SELECT new.user_id, new.zero_id FROM unnest(user_ids, zero_ids, kinds) AS new (user_id, zero_id, kind)
        WHERE kind IS NOT NULL AND NOT EXISTS (SELECT FROM stagecast.users WHERE users.user_id = new.user_id)
        ORDER BY user_id COLLATE "C"
        ON CONFLICT DO NOTHING;
    IF wait THEN
        locked := ARRAY(
            SELECT id FROM stagecast.users WHERE user_id = ANY (user_ids) ORDER BY user_id FOR NO KEY UPDATE
        );
    ELSE
        locked := ARRAY(
            SELECT id FROM stagecast.users WHERE user_id = ANY (user_ids) ORDER BY user_id
            FOR NO KEY UPDATE SKIP LOCKED
        );
    END IF;
    -- A statement of its own, which sees all that was committed before the locks were free.
    RETURN QUERY
    WITH entry AS MATERIALIZED (
        SELECT given.*, kind IS NOT NULL AS begins, clock_timestamp() > deadline AS late
        FROM unnest(
            user_ids, generation_ids, sequences, event_ids, contents, names, pictures, times, changes, ends, frees,
            deadlines, kinds, orders, keys, fingerprints, limits, externals
        ) WITH ORDINALITY AS given (
            user_id, generation_id, sequence, event_id, content, name, images, at, change, terminal, free,
            deadline, kind, request_json, key, fingerprint, most_unfinished, external, number
        )
    ), decided AS MATERIALIZED (
        SELECT entry.*, u.id AS owner, g.id AS generation, begun.generation_id AS begun, g.first_position AS first_there,
            g.end_position AS end_there, there.position AS position_there, there.event AS event_there,
            there.images AS images_there, u.head + 1 AS position, decision.credit, decision.reserved,
            CASE WHEN u.id IS NULL AND (begins OR NOT wait) THEN 'busy' ELSE decision.outcome END AS outcome,
            CASE WHEN decision.shows_credit
                THEN substring(content FROM 1 FOR length(content) - 1)
                    || convert_to(',"credit":' || decision.credit || '}', 'UTF8')
            END AS with_credit
        FROM entry
        LEFT JOIN LATERAL (
            SELECT * FROM stagecast.users WHERE user_id = entry.user_id AND id = ANY (locked) OFFSET 0
        ) AS u ON true
        LEFT JOIN stagecast.generations AS g ON g.generation_id = entry.generation_id AND (begins OR g.owner = u.id)
        LEFT JOIN LATERAL (
            SELECT * FROM stagecast.events
            WHERE generation = g.id AND sequence = entry.sequence AND event IS NOT NULL AND g.last >= entry.sequence
            OFFSET 0
        ) AS there ON true
        LEFT JOIN LATERAL (
            SELECT * FROM stagecast.generations WHERE owner = u.id AND idempotency_key = entry.key OFFSET 0
        ) AS begun ON true
        CROSS JOIN LATERAL (SELECT CASE WHEN g.id IS NULL OR g.deleted THEN 0 ELSE g.last END AS last) AS before
        CROSS JOIN LATERAL stagecast.decide_v1(
            g.id IS NOT NULL, g.end_position IS NOT NULL, before.last, there.event_id, begun.generation_id,
            begun.fingerprint, coalesce(u.active, 0), u.credit, coalesce(g.reserved, false),
            entry.sequence, entry.event_id, begins, entry.fingerprint, most_unfinished, change, late, credits
        ) AS decision
    ), accepted AS MATERIALIZED (
        SELECT numbered.*, CASE WHEN begins THEN nextval('stagecast.generations_id_seq') ELSE generation END
                AS generation_row,
            CASE WHEN terminal THEN position END AS end_position, CASE WHEN terminal THEN at END AS ended_at,
            CASE WHEN terminal THEN event_row END AS end_event, terminal AND outbox AS undelivered,
            -- The last code: what users sent comes before it.
            CASE WHEN terminal AND name = 'generation_failed'
                THEN substring(convert_from(content, 'UTF8') FROM '.*"code":"([a-z_]+)"')
            END AS code
        FROM (SELECT *, nextval('stagecast.events_id_seq') AS event_row FROM decided WHERE outcome = 'accepted')
            AS numbered
    ), begun AS (
        INSERT INTO stagecast.generations (
            id, generation_id, owner, kind, request_json, idempotency_key, fingerprint, external, reserved, free, last,
            first_position, end_position, ended_at, end_event, undelivered, code
        ) OVERRIDING SYSTEM VALUE
        SELECT generation_row, generation_id, owner, kind, request_json, key, fingerprint, external, reserved, free,
            sequence, position, end_position, ended_at, end_event, undelivered, code
        FROM accepted WHERE begins
    ), moved AS (
        UPDATE stagecast.generations AS g SET last = sequence, free = a.free, end_position = a.end_position,
            ended_at = a.ended_at, end_event = a.end_event, undelivered = a.undelivered, code = a.code
        FROM accepted AS a WHERE g.id = a.generation AND NOT begins
    ), charged AS (
        UPDATE stagecast.users SET head = position, credit = a.credit,
            active = active + begins::integer - terminal::integer
        FROM accepted AS a WHERE users.id = a.owner
    ), stored AS (
        INSERT INTO stagecast.events (id, owner, position, generation, sequence, event_id, name, event, images)
        OVERRIDING SYSTEM VALUE
        SELECT event_row, owner, position, generation_row, sequence, event_id, name, coalesce(with_credit, content),
            images::jsonb
        FROM accepted
    )
    SELECT outcome, CASE outcome WHEN 'again' THEN position_there ELSE position END,
        coalesce(first_there, position),
        CASE WHEN outcome = 'again' THEN end_there WHEN terminal THEN position END,
        CASE outcome WHEN 'again' THEN event_there ELSE with_credit END, images_there::text, begun
    FROM decided ORDER BY number;
END $$;


-- The entries after an id, and those of gaps that have been filled, in the order of ids; at least one row, without an
-- entry if there is none. Removals are among them, with what was removed. `oldest`: the oldest open transaction.
CREATE FUNCTION stagecast.read_v1(after bigint, gaps bigint[], most integer) RETURNS TABLE (
    oldest bigint, id bigint, user_id text, "position" bigint, event_id bigint, generation_id text, sequence integer,
    name text, event bytea, first_position bigint, images jsonb, end_position bigint, removed text[]
) LANGUAGE plpgsql STABLE SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint, entry.*
    FROM (SELECT) AS once LEFT JOIN (
        SELECT events.id, user_id, position, event_id, generation_id, sequence, name, event, first_position, images,
            end_position, NULL
        FROM (
            (SELECT * FROM stagecast.events WHERE id > after ORDER BY id LIMIT most)
            UNION ALL SELECT * FROM stagecast.events WHERE id = ANY (gaps)
        ) AS events
        JOIN stagecast.generations ON generations.id = events.generation
        JOIN stagecast.users ON users.id = events.owner
        UNION ALL
        SELECT id, user_id, NULL, event_id, NULL, NULL, NULL, NULL, NULL, NULL, NULL, generation_ids
        FROM (
            (SELECT * FROM stagecast.removals WHERE id > after ORDER BY id LIMIT most)
            UNION ALL SELECT * FROM stagecast.removals WHERE id = ANY (gaps)
        ) AS removals
    ) AS entry ON true
    ORDER BY entry.id;
END $$;


-- The last id drawn, and the ids below it that are not there, or not yet.
CREATE FUNCTION stagecast.newest_v1(look_back integer) RETURNS TABLE (id bigint, missing bigint[])
LANGUAGE sql STABLE AS $$
    SELECT last.id, ARRAY(
        SELECT generate_series(greatest(1, last.id - look_back + 1), last.id)
        EXCEPT SELECT id FROM stagecast.events WHERE id > last.id - look_back
        EXCEPT SELECT id FROM stagecast.removals WHERE id > last.id - look_back
    )
    FROM (SELECT CASE WHEN is_called THEN last_value ELSE 0 END AS id FROM stagecast.events_id_seq) AS last
$$;


-- Where a user's feed ends, and the first position of the oldest unfinished generation.
CREATE FUNCTION stagecast.head_v1(the_user text)
RETURNS TABLE (r_head bigint, r_floor bigint, r_floor_id bigint, r_head_id bigint, r_oldest bigint)
LANGUAGE sql STABLE AS $$
    SELECT head, floor, floor_id,
        (SELECT event_id FROM stagecast.events WHERE owner = users.id AND position = head),
        (SELECT min(first_position) FROM stagecast.generations WHERE owner = users.id AND end_position IS NULL)
    FROM stagecast.users WHERE user_id = the_user
$$;


-- A user's feed after a position, with the event id and the open tombstones at the anchor; at least one row for a user who
-- is known, without an entry if there is none.
CREATE FUNCTION stagecast.feed_v1(the_user text, after bigint, anchor bigint, most integer) RETURNS TABLE (
    head bigint, floor bigint, floor_id bigint, event_there bigint, deleted_spans bigint[], user_id text,
    "position" bigint, event_id bigint, generation_id text, sequence integer, name text, event bytea,
    first_position bigint, images jsonb, end_position bigint
) LANGUAGE plpgsql STABLE SET plan_cache_mode = force_generic_plan SET jit = off
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT reader.head, reader.floor, reader.floor_id, reader.event_there, reader.deleted_spans, reader.user_id,
        entry.position, entry.event_id, entry.generation_id, entry.sequence, entry.name, entry.event,
        entry.first_position, entry.images, entry.end_position
    FROM (
        SELECT users.*,
            (SELECT event_id FROM stagecast.events WHERE owner = users.id AND position = anchor) AS event_there,
            ARRAY(
                SELECT first_position FROM stagecast.generations
                WHERE owner = users.id AND deleted AND end_position > anchor AND first_position <= anchor
            ) AS deleted_spans
        FROM stagecast.users WHERE user_id = the_user
        OFFSET 0  -- so that this is computed once
    ) AS reader
    LEFT JOIN LATERAL (
        SELECT events.*, generation_id, first_position, end_position
        FROM stagecast.events JOIN stagecast.generations ON generations.id = events.generation
        WHERE events.owner = reader.id AND events.position > after
        ORDER BY events.position LIMIT most
    ) AS entry ON true
    ORDER BY entry.position;
END $$;


-- Claims the oldest undelivered ends for the node that no live node has claimed.
CREATE FUNCTION stagecast.claim_undelivered_v1(node text, seconds double precision, most integer) RETURNS TABLE (
    user_id text, "position" bigint, event_id bigint, generation_id text, sequence integer, name text, event bytea,
    first_position bigint, images jsonb, end_position bigint
) LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    WITH claimed AS (
        UPDATE stagecast.generations SET claimed_by = node, claimed_until = clock_timestamp() + make_interval(secs => seconds)
        WHERE id IN (
            SELECT id FROM stagecast.generations
            WHERE undelivered AND NOT EXISTS (SELECT FROM stagecast.nodes WHERE webhook_gone AND id <> node) AND (
                claimed_by IS NULL OR claimed_by = node OR claimed_until < clock_timestamp()
                OR claimed_by NOT IN (SELECT id FROM stagecast.nodes)
            )
            ORDER BY end_event LIMIT most FOR UPDATE SKIP LOCKED
        )
        RETURNING *
    )
    SELECT user_id, position, event_id, generation_id, sequence, name, event, first_position, images, end_position
    FROM claimed
    JOIN stagecast.users ON users.id = claimed.owner
    JOIN stagecast.events ON events.id = claimed.end_event
    ORDER BY events.id;
END $$;


CREATE FUNCTION stagecast.grant_v1(
    the_user text, zero_id bigint, change bigint, key text, at timestamptz, key_until timestamptz, credits bigint
) RETURNS TABLE (r_outcome text, r_credit bigint) LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
DECLARE
    u record;
    earlier record;
BEGIN
    INSERT INTO stagecast.users (user_id, floor_id) VALUES (the_user, zero_id) ON CONFLICT DO NOTHING;
    SELECT users.* INTO u FROM stagecast.users WHERE user_id = the_user FOR NO KEY UPDATE;
    DELETE FROM stagecast.grants WHERE (owner, idempotency_key) IN (
        SELECT owner, idempotency_key FROM stagecast.grants WHERE until <= at LIMIT 100 FOR UPDATE SKIP LOCKED
    );
    SELECT grants.* INTO earlier FROM stagecast.grants
        WHERE owner = u.id AND idempotency_key = key AND until > at;
    IF FOUND THEN
        RETURN QUERY SELECT CASE WHEN earlier.amount = change THEN 'again' ELSE 'mismatch' END, earlier.credit;
        RETURN;
    END IF;
    r_outcome := 'granted';
    r_credit := greatest(0, coalesce(u.credit, credits) + change);
    UPDATE stagecast.users SET credit = r_credit WHERE id = u.id;
    IF key IS NOT NULL THEN
        INSERT INTO stagecast.grants (owner, idempotency_key, amount, credit, until)
            VALUES (u.id, key, change, r_credit, key_until)
            ON CONFLICT (owner, idempotency_key)
            DO UPDATE SET amount = excluded.amount, credit = excluded.credit, until = excluded.until;
    END IF;
    RETURN NEXT;
END $$;


-- Notes a removal for the followers, and forgets some that are old: a follower that has not read for so long reads
-- everything again.
CREATE FUNCTION stagecast.note_removal_v1(the_user text, generation_ids text[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO stagecast.removals (user_id, generation_ids) VALUES (the_user, generation_ids);
    DELETE FROM stagecast.removals WHERE id IN (
        SELECT id FROM stagecast.removals WHERE at < clock_timestamp() - interval '1 hour'
            LIMIT 2 FOR UPDATE SKIP LOCKED
    );
END $$;


-- Removes a finished generation: 'removed', 'unfinished', or 'unknown'.
CREATE FUNCTION stagecast.remove_v1(the_generation text, retention boolean) RETURNS text
LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
DECLARE
    u record;
    g record;
    new_floor bigint;
    gone bigint[];
BEGIN
    SELECT users.* INTO u FROM stagecast.users
        WHERE id = (SELECT owner FROM stagecast.generations WHERE generation_id = the_generation) FOR NO KEY UPDATE;
    SELECT generations.* INTO g FROM stagecast.generations WHERE generation_id = the_generation;
    IF g.id IS NULL OR (g.deleted AND NOT retention) THEN
        RETURN 'unknown';
    ELSIF g.end_position IS NULL THEN
        RETURN 'unfinished';
    END IF;
    new_floor := u.floor;
    IF retention AND g.end_position > u.floor THEN
        new_floor := g.end_position;
        UPDATE stagecast.users SET floor = new_floor,
            floor_id = (SELECT event_id FROM stagecast.events WHERE owner = u.id AND position = new_floor)
            WHERE id = u.id;
    END IF;
    IF NOT g.deleted THEN
        PERFORM stagecast.note_removal_v1(u.user_id, ARRAY[the_generation]);
    END IF;
    DELETE FROM stagecast.stored_images WHERE generation_id = the_generation;
    UPDATE stagecast.generations SET deleted = true, request_json = '', idempotency_key = NULL, fingerprint = '',
        undelivered = false, code = NULL WHERE id = g.id;
    IF g.end_position > new_floor THEN
        UPDATE stagecast.events SET event = NULL, images = NULL WHERE generation = g.id;
    END IF;
    SELECT coalesce(array_agg(id), '{}') INTO gone FROM stagecast.generations
        WHERE owner = u.id AND deleted AND end_position <= new_floor;
    DELETE FROM stagecast.events WHERE generation = ANY (gone);
    DELETE FROM stagecast.generations WHERE id = ANY (gone);
    RETURN 'removed';
END $$;


-- Removes all that is stored of a user, and returns the ids of the generations; NULL: one is unfinished.
CREATE FUNCTION stagecast.remove_user_v1(the_user text) RETURNS text[]
LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
DECLARE
    u record;
    removed text[];
BEGIN
    SELECT users.* INTO u FROM stagecast.users WHERE user_id = the_user FOR UPDATE;
    IF NOT FOUND THEN
        RETURN '{}';
    ELSIF u.active > 0 THEN
        RETURN NULL;
    END IF;
    SELECT coalesce(array_agg(generation_id), '{}') INTO removed FROM stagecast.generations WHERE owner = u.id;
    PERFORM stagecast.note_removal_v1(
        the_user,
        ARRAY(SELECT generation_id FROM stagecast.generations WHERE owner = u.id AND NOT deleted ORDER BY id)
            || NULL::text
    );
    DELETE FROM stagecast.events WHERE owner = u.id;
    DELETE FROM stagecast.generations WHERE owner = u.id;
    DELETE FROM stagecast.grants WHERE owner = u.id;
    DELETE FROM stagecast.stored_images WHERE generation_id = ANY (removed);
    DELETE FROM stagecast.users WHERE id = u.id;
    RETURN removed;
END $$;


-- Saves a session, removes some that have expired, and beyond `most` of the user the least recently used ones.
CREATE FUNCTION stagecast.save_session_v1(
    the_pid text, the_user text, expires timestamptz, for_service boolean, live bigint, event bigint, seen bigint,
    tombstones bigint[], head bigint, tag text, at timestamptz, expired timestamptz, most integer, node text
) RETURNS void LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
DECLARE
    before text;
BEGIN
    SELECT holder INTO before FROM stagecast.sessions WHERE sessions.pid = the_pid FOR UPDATE;
    DELETE FROM stagecast.takeovers WHERE takeovers.node = $14 AND takeovers.pid = the_pid;
    INSERT INTO stagecast.takeovers
        SELECT id, the_pid FROM stagecast.nodes WHERE id = before AND id <> $14 FOR KEY SHARE ON CONFLICT DO NOTHING;
    DELETE FROM stagecast.sessions WHERE sessions.pid IN (
        SELECT sessions.pid FROM stagecast.sessions WHERE touched_at <= expired LIMIT 100 FOR UPDATE SKIP LOCKED
    );
    INSERT INTO stagecast.sessions
        (pid, user_id, expires_at, service, live, event_id, seen, open_tombstones, head, tag, touched_at, holder)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, node)
        ON CONFLICT (pid) DO UPDATE SET user_id = $2, expires_at = $3, service = $4, live = $5, event_id = $6,
            seen = $7, open_tombstones = $8, head = $9, tag = $10, touched_at = $11, holder = excluded.holder;
    DELETE FROM stagecast.sessions WHERE sessions.pid IN (
        SELECT sessions.pid FROM stagecast.sessions WHERE user_id = the_user
            ORDER BY touched_at DESC, id DESC OFFSET most
    );
END $$;


-- Notes that the node lives, and returns what each node has noted last. By the clock of this server only.
CREATE FUNCTION stagecast.beat_v1(node text, its_address text, its_sockets integer, its_streams integer)
RETURNS TABLE (
    r_id text, r_address text, r_sockets integer, r_streams integer, r_seen timestamptz, r_now timestamptz
)
LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
BEGIN
    INSERT INTO stagecast.nodes (id, address, seen, sockets, streams)
        VALUES (node, its_address, clock_timestamp(), its_sockets, its_streams)
        ON CONFLICT (id)
        DO UPDATE SET seen = excluded.seen, sockets = excluded.sockets, streams = excluded.streams;
    RETURN QUERY SELECT id, address, sockets, streams, seen, clock_timestamp() FROM stagecast.nodes;
END $$;


CREATE FUNCTION stagecast.offer_v1(node text, the_user text, the_generation text, for_fetching boolean)
RETURNS boolean LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
DECLARE
    next_turn bigint := greatest(
        (SELECT max(turn) + 1 FROM stagecast.leases WHERE user_id = the_user AND fetching = for_fetching AND waiting),
        (SELECT min(turn) FROM stagecast.leases WHERE fetching = for_fetching AND waiting),
        0
    );
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    INSERT INTO stagecast.leases AS held (generation_id, user_id, fetching, waiting, turn)
        VALUES (the_generation, the_user, for_fetching, true, next_turn)
        ON CONFLICT (generation_id)
        DO UPDATE SET fetching = false, waiting = true, turn = excluded.turn, ticket = DEFAULT
            WHERE NOT for_fetching AND held.fetching AND held.holder = node AND NOT held.waiting;
    RETURN FOUND;
END $$;


-- Takes a generation out of its line, where its user's later ones move up: not during a claim, which would skip them.
CREATE FUNCTION stagecast.withdraw_v1(the_generation text) RETURNS boolean
LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
DECLARE
    place record;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    PERFORM pg_advisory_xact_lock(hashtext('stagecast.claim'));
    SELECT leases.* INTO place FROM stagecast.leases WHERE generation_id = the_generation AND waiting FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    DELETE FROM stagecast.leases WHERE generation_id = the_generation AND holder IS NULL;
    UPDATE stagecast.leases SET waiting = false, fetching = true WHERE generation_id = the_generation;
    UPDATE stagecast.leases SET turn = turn - 1
        WHERE user_id = place.user_id AND fetching = place.fetching AND waiting AND turn > place.turn;
    RETURN true;
END $$;


-- All leases, with the rank of those that wait. Those of users who fetch for as many as allowed rank last.
CREATE FUNCTION stagecast.leases_v1(most_fetching integer)
RETURNS TABLE (r_generation text, r_waiting boolean, r_holder text, r_rank bigint) LANGUAGE sql STABLE AS $$
    SELECT leases.generation_id, waiting, holder,
        row_number() OVER (
            PARTITION BY waiting, fetching ORDER BY fetching AND busy.many IS NOT NULL, turn, ticket
        )
    FROM stagecast.leases LEFT JOIN (
        SELECT user_id, true AS many FROM stagecast.leases WHERE holder IS NOT NULL AND (fetching OR waiting)
        GROUP BY user_id HAVING count(*) >= most_fetching
    ) AS busy USING (user_id)
$$;


-- At most `most` generations of a line, in its order; `own_only`: of those that the node has fetched for. A claim need not
-- outlive a crash of the server: the append that comes before any paid work is flushed after it.
CREATE FUNCTION stagecast.claim_v1(
    node text, for_fetching boolean, most integer, most_fetching integer, own_only boolean
) RETURNS SETOF text LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
DECLARE
    found_id text;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    PERFORM pg_advisory_xact_lock(hashtext('stagecast.claim'));
    FOR round IN 1..most LOOP
        UPDATE stagecast.leases SET waiting = false, holder = node WHERE generation_id = (
            SELECT generation_id FROM stagecast.leases AS line
            WHERE waiting AND fetching = for_fetching AND (holder = node OR holder IS NULL AND NOT own_only) AND (
                NOT for_fetching OR most_fetching > (
                    SELECT count(*) FROM stagecast.leases AS held
                    WHERE held.user_id = line.user_id AND held.holder IS NOT NULL AND (held.fetching OR held.waiting)
                )
            )
            ORDER BY turn, ticket LIMIT 1 FOR UPDATE SKIP LOCKED
        ) RETURNING generation_id INTO found_id;
        EXIT WHEN NOT FOUND;
        RETURN NEXT found_id;
    END LOOP;
END $$;


CREATE FUNCTION stagecast.release_v1(node text, the_generation text) RETURNS void
LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    UPDATE stagecast.leases SET holder = NULL WHERE generation_id = the_generation AND holder = node AND waiting;
    DELETE FROM stagecast.leases WHERE generation_id = the_generation AND holder = node AND NOT waiting;
END $$;


-- Ends the leases of dead nodes. Returns the unfinished generations that nobody holds and that are in no line, apart
-- from external ones.
CREATE FUNCTION stagecast.abandoned_v1(dead text[]) RETURNS SETOF text
LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
BEGIN
    DELETE FROM stagecast.nodes WHERE id = ANY (dead);
    DELETE FROM stagecast.devices WHERE node NOT IN (SELECT id FROM stagecast.nodes);
    DELETE FROM stagecast.leases WHERE holder IS NOT NULL AND holder NOT IN (SELECT id FROM stagecast.nodes);
    RETURN QUERY SELECT generation_id FROM stagecast.generations
        WHERE end_position IS NULL AND NOT external AND NOT EXISTS (
            SELECT FROM stagecast.leases WHERE leases.generation_id = generations.generation_id
        )
        ORDER BY id;
END $$;


CREATE FUNCTION stagecast.claim_chore_v1(node text, chore text, seconds double precision, dead text[])
RETURNS boolean LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    INSERT INTO stagecast.chores AS chores (name, holder, until)
        VALUES (chore, node, clock_timestamp() + make_interval(secs => seconds))
        ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, until = excluded.until
            WHERE chores.holder = node OR chores.until < clock_timestamp() OR chores.holder = ANY (dead)
                OR chores.holder NOT IN (SELECT id FROM stagecast.nodes);
    RETURN FOUND;
END $$;


-- Counts a start, unless the user has had `most` within a minute: then returns the seconds until the next may begin.
CREATE FUNCTION stagecast.count_start_v1(the_user text, most integer) RETURNS double precision
LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
DECLARE
    now_there timestamptz;
    earlier record;
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('stagecast.starts'), hashtext(the_user));
    now_there := clock_timestamp();
    DELETE FROM stagecast.starts WHERE ctid IN (
        SELECT ctid FROM stagecast.starts WHERE at <= now_there - interval '1 minute' LIMIT 4 FOR UPDATE SKIP LOCKED
    );
    SELECT count(*) AS count, min(at) AS first INTO earlier FROM stagecast.starts
        WHERE user_id = the_user AND at > now_there - interval '1 minute';
    IF earlier.count >= most THEN
        RETURN extract(epoch FROM earlier.first + interval '1 minute' - now_there);
    END IF;
    INSERT INTO stagecast.starts VALUES (the_user, now_there);
    RETURN NULL;
END $$;


-- Notes that this node has so many devices of the user, unless all live nodes then have more than `most`.
CREATE FUNCTION stagecast.admit_device_v1(this_node text, the_user text, here integer, most integer) RETURNS boolean
LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
BEGIN
    PERFORM pg_advisory_xact_lock(hashtext('stagecast.devices'), hashtext(the_user));
    IF here + (
        SELECT coalesce(sum(count), 0) FROM stagecast.devices
        WHERE user_id = the_user AND node <> this_node AND node IN (SELECT id FROM stagecast.nodes)
    ) > most THEN
        RETURN false;
    END IF;
    INSERT INTO stagecast.devices VALUES (the_user, this_node, here)
        ON CONFLICT (user_id, node) DO UPDATE SET count = excluded.count;
    RETURN true;
END $$;


-- The devices that this node has left of these users.
CREATE FUNCTION stagecast.note_devices_v1(this_node text, users text[], counts integer[]) RETURNS void
LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
BEGIN
    UPDATE stagecast.devices SET count = noted.count FROM unnest(users, counts) AS noted (user_id, count)
        WHERE devices.user_id = noted.user_id AND node = this_node;
    DELETE FROM stagecast.devices WHERE node = this_node AND user_id = ANY (users) AND count = 0;
END $$;


-- Counts bytes of stored images. Those of an unknown generation are counted if its user is given.
CREATE FUNCTION stagecast.add_stored_v1(the_generation text, the_user text, bytes bigint) RETURNS void
LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    UPDATE stagecast.stored_images SET size = greatest(0, size + bytes) WHERE generation_id = the_generation;
    IF NOT FOUND AND bytes > 0 AND the_user IS NOT NULL THEN
        INSERT INTO stagecast.stored_images AS stored VALUES (the_generation, the_user, bytes)
            ON CONFLICT (generation_id) DO UPDATE SET size = stored.size + bytes;
    END IF;
    DELETE FROM stagecast.stored_images WHERE generation_id = the_generation AND size = 0;
END $$;
