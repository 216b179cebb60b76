ALTER TABLE generations ADD COLUMN code TEXT;  -- of its failure
UPDATE generations SET code = (
    SELECT iif(json_valid(CAST(event AS TEXT)), json_extract(CAST(event AS TEXT), '$.code'), NULL) FROM events
    WHERE events.id = end_event AND name = 'generation_failed'
) WHERE end_event IS NOT NULL AND deleted = 0;
CREATE INDEX unfinished_generations ON generations (id) WHERE end_position IS NULL;
CREATE INDEX generations_of_kind ON generations (kind, id) WHERE deleted = 0;
CREATE INDEX failed_generations ON generations (id, code) WHERE code IS NOT NULL;
CREATE INDEX recent_failures ON generations (ended_at, code) WHERE code IS NOT NULL;
