-- USER is a reserved word of PostgreSQL. The images of an event were only in the URLs of its JSON.
ALTER TABLE generations RENAME COLUMN user TO owner;
ALTER TABLE events RENAME COLUMN user TO owner;
ALTER TABLE grants RENAME COLUMN user TO owner;
ALTER TABLE damaged_generations RENAME COLUMN user TO owner;
ALTER TABLE damaged_events RENAME COLUMN user TO owner;
ALTER TABLE sessions RENAME COLUMN untold TO open_tombstones;
ALTER TABLE events ADD COLUMN images TEXT;  -- JSON: the names of its pictures by field; NULL: it has none
ALTER TABLE damaged_events ADD COLUMN images;
UPDATE events SET images = found.images FROM (
    SELECT events.id,
        json_group_object(field, substr(url.value, instr(url.value, '/' || generation_id || '-') + 1)) AS images
    FROM events
    JOIN generations ON generations.id = events.generation
    JOIN json_each(iif(json_valid(CAST(event AS TEXT)), CAST(event AS TEXT), '{}')) AS url
    JOIN (
        SELECT 'compositionUrl' AS key, 'composition_url' AS field UNION ALL
        SELECT 'previewUrl', 'preview_url' UNION ALL
        SELECT 'editedImageUrl', 'edited_image_url' UNION ALL
        SELECT 'generatedImageUrl', 'generated_image_url' UNION ALL
        SELECT 'faceSwapUrl', 'face_swap_url'
    ) AS fields ON fields.key = url.key
    WHERE event IS NOT NULL AND url.type = 'text' AND url.value GLOB '*/' || generation_id || '-*'
    GROUP BY events.id
) AS found WHERE found.id = events.id;
