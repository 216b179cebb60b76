PRAGMA application_id = 1400136039;
PRAGMA user_version = 4;
BEGIN TRANSACTION;
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
INSERT INTO "events" VALUES(6,1,6,2,1,2619584367602144611,'generation_started',CAST('{"generationId":"edit_1795978090576_ew8gxsq2676cnbfr","kind":"edit","sequence":1,"status":"started","message":"Image editing started...","progress":0,"occurredAt":"2026-11-29T18:48:10.590Z","credit":98}' AS BLOB));
INSERT INTO "events" VALUES(7,1,7,2,2,7351545519276377610,'continue',CAST('{"generationId":"edit_1795978090576_ew8gxsq2676cnbfr","kind":"edit","sequence":2,"status":"composition","message":"Composing images...","progress":20,"occurredAt":"2026-11-29T18:48:10.601Z"}' AS BLOB));
INSERT INTO "events" VALUES(8,1,8,2,3,782075307184214517,'continue',CAST('{"generationId":"edit_1795978090576_ew8gxsq2676cnbfr","kind":"edit","sequence":3,"status":"composition_completed","message":"Image composition completed, starting OpenAI editing...","progress":40,"occurredAt":"2026-11-29T18:48:10.631Z","compositionUrl":"http://localhost:3000/images/edit_1795978090576_ew8gxsq2676cnbfr-12a3e6e712c8300c98571509836cbf44.png"}' AS BLOB));
INSERT INTO "events" VALUES(9,1,9,2,4,955440424276292888,'continue',CAST('{"generationId":"edit_1795978090576_ew8gxsq2676cnbfr","kind":"edit","sequence":4,"status":"openai_editing","message":"OpenAI image editing started...","progress":60,"occurredAt":"2026-11-29T18:48:10.647Z","compositionUrl":"http://localhost:3000/images/edit_1795978090576_ew8gxsq2676cnbfr-12a3e6e712c8300c98571509836cbf44.png"}' AS BLOB));
INSERT INTO "events" VALUES(10,1,10,2,5,4196577866200093125,'continue',CAST('{"generationId":"edit_1795978090576_ew8gxsq2676cnbfr","kind":"edit","sequence":5,"status":"openai_editing_completed","message":"OpenAI image editing completed successfully!","progress":80,"occurredAt":"2026-11-29T18:48:10.670Z","compositionUrl":"http://localhost:3000/images/edit_1795978090576_ew8gxsq2676cnbfr-12a3e6e712c8300c98571509836cbf44.png","editedImageUrl":"http://localhost:3000/images/edit_1795978090576_ew8gxsq2676cnbfr-d87a205399a714a6a5ce4a6f478e8f50.png"}' AS BLOB));
INSERT INTO "events" VALUES(11,1,11,2,6,2746468471987664033,'generation_completed',CAST('{"generationId":"edit_1795978090576_ew8gxsq2676cnbfr","kind":"edit","sequence":6,"status":"completed","message":"Image editing completed successfully!","progress":100,"occurredAt":"2026-11-29T18:48:10.677Z","compositionUrl":"http://localhost:3000/images/edit_1795978090576_ew8gxsq2676cnbfr-12a3e6e712c8300c98571509836cbf44.png","editedImageUrl":"http://localhost:3000/images/edit_1795978090576_ew8gxsq2676cnbfr-d87a205399a714a6a5ce4a6f478e8f50.png","credit":98}' AS BLOB));
INSERT INTO "events" VALUES(12,2,1,3,1,3713790216831245935,'generation_started',CAST('{"generationId":"edit_1795978090730_16cg1h2e4l9uj1gt","kind":"edit","sequence":1,"status":"started","message":"Image editing started...","progress":0,"occurredAt":"2026-11-29T18:48:10.742Z","metadata":{"title":"Şapka 🎩"},"credit":99}' AS BLOB));
INSERT INTO "events" VALUES(13,2,2,3,2,644877013329930065,'continue',CAST('{"generationId":"edit_1795978090730_16cg1h2e4l9uj1gt","kind":"edit","sequence":2,"status":"composition","message":"Composing images...","progress":20,"occurredAt":"2026-11-29T18:48:10.749Z","metadata":{"title":"Şapka 🎩"}}' AS BLOB));
INSERT INTO "events" VALUES(14,2,3,3,3,673813522969904744,'continue',CAST('{"generationId":"edit_1795978090730_16cg1h2e4l9uj1gt","kind":"edit","sequence":3,"status":"composition_completed","message":"Image composition completed, starting OpenAI editing...","progress":40,"occurredAt":"2026-11-29T18:48:10.758Z","metadata":{"title":"Şapka 🎩"},"compositionUrl":"http://localhost:3000/images/edit_1795978090730_16cg1h2e4l9uj1gt-71c607e0836d72597080ec3591a7c1aa.png"}' AS BLOB));
INSERT INTO "events" VALUES(15,2,4,3,4,3826409772489845757,'continue',CAST('{"generationId":"edit_1795978090730_16cg1h2e4l9uj1gt","kind":"edit","sequence":4,"status":"openai_editing","message":"OpenAI image editing started...","progress":60,"occurredAt":"2026-11-29T18:48:10.764Z","metadata":{"title":"Şapka 🎩"},"compositionUrl":"http://localhost:3000/images/edit_1795978090730_16cg1h2e4l9uj1gt-71c607e0836d72597080ec3591a7c1aa.png"}' AS BLOB));
INSERT INTO "events" VALUES(16,2,5,3,5,2503301683729104273,'continue',CAST('{"generationId":"edit_1795978090730_16cg1h2e4l9uj1gt","kind":"edit","sequence":5,"status":"openai_editing_completed","message":"OpenAI image editing completed successfully!","progress":80,"occurredAt":"2026-11-29T18:48:10.770Z","metadata":{"title":"Şapka 🎩"},"compositionUrl":"http://localhost:3000/images/edit_1795978090730_16cg1h2e4l9uj1gt-71c607e0836d72597080ec3591a7c1aa.png","editedImageUrl":"http://localhost:3000/images/edit_1795978090730_16cg1h2e4l9uj1gt-d0d70a0d2dc829e39acc8066fc45baef.png"}' AS BLOB));
INSERT INTO "events" VALUES(17,2,6,3,6,8345541645951770360,'generation_completed',CAST('{"generationId":"edit_1795978090730_16cg1h2e4l9uj1gt","kind":"edit","sequence":6,"status":"completed","message":"Image editing completed successfully!","progress":100,"occurredAt":"2026-11-29T18:48:10.772Z","metadata":{"title":"Şapka 🎩"},"compositionUrl":"http://localhost:3000/images/edit_1795978090730_16cg1h2e4l9uj1gt-71c607e0836d72597080ec3591a7c1aa.png","editedImageUrl":"http://localhost:3000/images/edit_1795978090730_16cg1h2e4l9uj1gt-d0d70a0d2dc829e39acc8066fc45baef.png","credit":99}' AS BLOB));
INSERT INTO "events" VALUES(18,2,7,4,1,1249412858307910984,'generation_started',CAST('{"generationId":"edit_1795978090809_zihjz7coxgpltyck","kind":"edit","sequence":1,"status":"started","message":"Image editing started...","progress":0,"occurredAt":"2026-11-29T18:48:10.821Z","inputImage":"http://pictures.test/face.png","credit":98}' AS BLOB));
INSERT INTO "events" VALUES(19,2,8,4,2,5947535278625350700,'continue',CAST('{"generationId":"edit_1795978090809_zihjz7coxgpltyck","kind":"edit","sequence":2,"status":"composition","message":"Composing images...","progress":20,"occurredAt":"2026-11-29T18:48:10.831Z"}' AS BLOB));
INSERT INTO "events" VALUES(20,2,9,4,3,8574905703042263267,'continue',CAST('{"generationId":"edit_1795978090809_zihjz7coxgpltyck","kind":"edit","sequence":3,"status":"composition_completed","message":"Image composition completed, starting OpenAI editing...","progress":40,"occurredAt":"2026-11-29T18:48:10.849Z","compositionUrl":"http://localhost:3000/images/edit_1795978090809_zihjz7coxgpltyck-21637fb2b543aaad6c06cdd501416e25.png"}' AS BLOB));
INSERT INTO "events" VALUES(21,2,10,4,4,6884371636044142608,'continue',CAST('{"generationId":"edit_1795978090809_zihjz7coxgpltyck","kind":"edit","sequence":4,"status":"openai_editing","message":"OpenAI image editing started...","progress":60,"occurredAt":"2026-11-29T18:48:10.851Z","compositionUrl":"http://localhost:3000/images/edit_1795978090809_zihjz7coxgpltyck-21637fb2b543aaad6c06cdd501416e25.png"}' AS BLOB));
INSERT INTO "events" VALUES(22,2,11,4,5,3174533578942166793,'continue',CAST('{"generationId":"edit_1795978090809_zihjz7coxgpltyck","kind":"edit","sequence":5,"status":"openai_editing_completed","message":"OpenAI image editing completed successfully!","progress":80,"occurredAt":"2026-11-29T18:48:10.872Z","compositionUrl":"http://localhost:3000/images/edit_1795978090809_zihjz7coxgpltyck-21637fb2b543aaad6c06cdd501416e25.png","editedImageUrl":"http://localhost:3000/images/edit_1795978090809_zihjz7coxgpltyck-b15daec1c4e5c5c1666edd343fd00dd2.png"}' AS BLOB));
INSERT INTO "events" VALUES(23,2,12,4,6,1358459349259812237,'continue',CAST('{"generationId":"edit_1795978090809_zihjz7coxgpltyck","kind":"edit","sequence":6,"status":"face_swap","message":"Applying face swap...","progress":85,"occurredAt":"2026-11-29T18:48:10.881Z","compositionUrl":"http://localhost:3000/images/edit_1795978090809_zihjz7coxgpltyck-21637fb2b543aaad6c06cdd501416e25.png","editedImageUrl":"http://localhost:3000/images/edit_1795978090809_zihjz7coxgpltyck-b15daec1c4e5c5c1666edd343fd00dd2.png"}' AS BLOB));
INSERT INTO "events" VALUES(24,2,13,4,7,220764362773453520,'continue',CAST('{"generationId":"edit_1795978090809_zihjz7coxgpltyck","kind":"edit","sequence":7,"status":"face_swap_completed","message":"Face swap completed successfully!","progress":95,"occurredAt":"2026-11-29T18:48:10.884Z","compositionUrl":"http://localhost:3000/images/edit_1795978090809_zihjz7coxgpltyck-21637fb2b543aaad6c06cdd501416e25.png","editedImageUrl":"http://localhost:3000/images/edit_1795978090809_zihjz7coxgpltyck-b15daec1c4e5c5c1666edd343fd00dd2.png","faceSwapUrl":"http://localhost:3000/images/edit_1795978090809_zihjz7coxgpltyck-c174f474003800fada11d4ff13878686.png"}' AS BLOB));
INSERT INTO "events" VALUES(25,2,14,4,8,8673056693191726077,'generation_completed',CAST('{"generationId":"edit_1795978090809_zihjz7coxgpltyck","kind":"edit","sequence":8,"status":"completed","message":"Image editing completed successfully!","progress":100,"occurredAt":"2026-11-29T18:48:10.885Z","compositionUrl":"http://localhost:3000/images/edit_1795978090809_zihjz7coxgpltyck-21637fb2b543aaad6c06cdd501416e25.png","editedImageUrl":"http://localhost:3000/images/edit_1795978090809_zihjz7coxgpltyck-b15daec1c4e5c5c1666edd343fd00dd2.png","faceSwapUrl":"http://localhost:3000/images/edit_1795978090809_zihjz7coxgpltyck-c174f474003800fada11d4ff13878686.png","credit":98}' AS BLOB));
INSERT INTO "events" VALUES(26,2,15,5,1,4744626702853839759,'generation_started',CAST('{"generationId":"edit_1795978090910_kj7tzzarvurb94d9","kind":"edit","sequence":1,"status":"started","message":"Image editing started...","progress":0,"occurredAt":"2026-11-29T18:48:10.913Z","inputImage":"http://pictures.test/face.png","credit":97}' AS BLOB));
INSERT INTO "events" VALUES(27,2,16,5,2,6798553893643966033,'continue',CAST('{"generationId":"edit_1795978090910_kj7tzzarvurb94d9","kind":"edit","sequence":2,"status":"composition","message":"Composing images...","progress":20,"occurredAt":"2026-11-29T18:48:10.916Z"}' AS BLOB));
INSERT INTO "events" VALUES(28,2,17,5,3,6409429387418630377,'continue',CAST('{"generationId":"edit_1795978090910_kj7tzzarvurb94d9","kind":"edit","sequence":3,"status":"composition_completed","message":"Image composition completed, starting OpenAI editing...","progress":40,"occurredAt":"2026-11-29T18:48:10.920Z","compositionUrl":"http://localhost:3000/images/edit_1795978090910_kj7tzzarvurb94d9-a276fd8b6dfc3dca87bf93e20252e6a4.png"}' AS BLOB));
INSERT INTO "events" VALUES(29,2,18,5,4,3108898793567945335,'continue',CAST('{"generationId":"edit_1795978090910_kj7tzzarvurb94d9","kind":"edit","sequence":4,"status":"openai_editing","message":"OpenAI image editing started...","progress":60,"occurredAt":"2026-11-29T18:48:10.921Z","compositionUrl":"http://localhost:3000/images/edit_1795978090910_kj7tzzarvurb94d9-a276fd8b6dfc3dca87bf93e20252e6a4.png"}' AS BLOB));
INSERT INTO "events" VALUES(30,2,19,5,5,1034575578692143356,'continue',CAST('{"generationId":"edit_1795978090910_kj7tzzarvurb94d9","kind":"edit","sequence":5,"status":"openai_editing_completed","message":"OpenAI image editing completed successfully!","progress":80,"occurredAt":"2026-11-29T18:48:10.922Z","compositionUrl":"http://localhost:3000/images/edit_1795978090910_kj7tzzarvurb94d9-a276fd8b6dfc3dca87bf93e20252e6a4.png","editedImageUrl":"http://localhost:3000/images/edit_1795978090910_kj7tzzarvurb94d9-eb5f6b78dee3db7181b278e0acac5c5d.png"}' AS BLOB));
INSERT INTO "events" VALUES(31,2,20,5,6,7108207101740140364,'continue',CAST('{"generationId":"edit_1795978090910_kj7tzzarvurb94d9","kind":"edit","sequence":6,"status":"face_swap","message":"Applying face swap...","progress":85,"occurredAt":"2026-11-29T18:48:10.923Z","compositionUrl":"http://localhost:3000/images/edit_1795978090910_kj7tzzarvurb94d9-a276fd8b6dfc3dca87bf93e20252e6a4.png","editedImageUrl":"http://localhost:3000/images/edit_1795978090910_kj7tzzarvurb94d9-eb5f6b78dee3db7181b278e0acac5c5d.png"}' AS BLOB));
INSERT INTO "events" VALUES(32,2,21,5,7,8233039419335824254,'generation_completed',CAST('{"generationId":"edit_1795978090910_kj7tzzarvurb94d9","kind":"edit","sequence":7,"status":"completed","message":"Image editing completed, but the face swap failed.","progress":100,"occurredAt":"2026-11-29T18:48:10.923Z","compositionUrl":"http://localhost:3000/images/edit_1795978090910_kj7tzzarvurb94d9-a276fd8b6dfc3dca87bf93e20252e6a4.png","editedImageUrl":"http://localhost:3000/images/edit_1795978090910_kj7tzzarvurb94d9-eb5f6b78dee3db7181b278e0acac5c5d.png","faceSwapError":{"code":"provider_unavailable","message":"The image service is not available right now. Please try again."},"credit":97}' AS BLOB));
INSERT INTO "events" VALUES(33,2,22,6,1,4078813207642869364,'generation_started',CAST('{"generationId":"gen_1795978090945_w6l4k30rpwft48li","kind":"generate","sequence":1,"status":"started","message":"Image generation started...","progress":0,"occurredAt":"2026-11-29T18:48:10.949Z","credit":96}' AS BLOB));
INSERT INTO "events" VALUES(34,2,23,6,2,8314914280452299422,'continue',CAST('{"generationId":"gen_1795978090945_w6l4k30rpwft48li","kind":"generate","sequence":2,"status":"composition","message":"Composing images...","progress":20,"occurredAt":"2026-11-29T18:48:10.952Z"}' AS BLOB));
INSERT INTO "events" VALUES(35,2,24,6,3,5228799747402086434,'continue',CAST('{"generationId":"gen_1795978090945_w6l4k30rpwft48li","kind":"generate","sequence":3,"status":"composition_completed","message":"Image composition completed, starting AI generation...","progress":40,"occurredAt":"2026-11-29T18:48:10.956Z","compositionUrl":"http://localhost:3000/images/gen_1795978090945_w6l4k30rpwft48li-59631cb4d8d1d0abf3fe0ae11ee90c7f.png"}' AS BLOB));
INSERT INTO "events" VALUES(36,2,25,6,4,3046705344723312376,'continue',CAST('{"generationId":"gen_1795978090945_w6l4k30rpwft48li","kind":"generate","sequence":4,"status":"ai_generation","message":"AI image generation started...","progress":60,"occurredAt":"2026-11-29T18:48:10.957Z","compositionUrl":"http://localhost:3000/images/gen_1795978090945_w6l4k30rpwft48li-59631cb4d8d1d0abf3fe0ae11ee90c7f.png"}' AS BLOB));
INSERT INTO "events" VALUES(37,2,26,6,5,2612075462902318828,'generation_completed',CAST('{"generationId":"gen_1795978090945_w6l4k30rpwft48li","kind":"generate","sequence":5,"status":"completed","message":"Image generation completed successfully!","progress":100,"occurredAt":"2026-11-29T18:48:10.960Z","compositionUrl":"http://localhost:3000/images/gen_1795978090945_w6l4k30rpwft48li-59631cb4d8d1d0abf3fe0ae11ee90c7f.png","generatedImageUrl":"http://localhost:3000/images/gen_1795978090945_w6l4k30rpwft48li-ec48de7c97ffd94403f5b64af4d50f59.png","credit":96}' AS BLOB));
INSERT INTO "events" VALUES(38,2,27,7,1,5351142758139966361,'generation_started',CAST('{"generationId":"edit_1795978090981_6ise1mjceu0h19ac","kind":"edit","sequence":1,"status":"started","message":"Image editing started...","progress":0,"occurredAt":"2026-11-29T18:48:10.983Z","credit":95}' AS BLOB));
INSERT INTO "events" VALUES(39,2,28,7,2,33864393372835652,'continue',CAST('{"generationId":"edit_1795978090981_6ise1mjceu0h19ac","kind":"edit","sequence":2,"status":"composition","message":"Composing images...","progress":20,"occurredAt":"2026-11-29T18:48:10.987Z"}' AS BLOB));
INSERT INTO "events" VALUES(40,2,29,7,3,2461766461798756517,'continue',CAST('{"generationId":"edit_1795978090981_6ise1mjceu0h19ac","kind":"edit","sequence":3,"status":"composition_completed","message":"Image composition completed, starting OpenAI editing...","progress":40,"occurredAt":"2026-11-29T18:48:10.993Z","compositionUrl":"http://localhost:3000/images/edit_1795978090981_6ise1mjceu0h19ac-4da6726809168a092c627919a4b8a011.png"}' AS BLOB));
INSERT INTO "events" VALUES(41,2,30,7,4,7568172120842998770,'continue',CAST('{"generationId":"edit_1795978090981_6ise1mjceu0h19ac","kind":"edit","sequence":4,"status":"openai_editing","message":"OpenAI image editing started...","progress":60,"occurredAt":"2026-11-29T18:48:10.994Z","compositionUrl":"http://localhost:3000/images/edit_1795978090981_6ise1mjceu0h19ac-4da6726809168a092c627919a4b8a011.png"}' AS BLOB));
INSERT INTO "events" VALUES(42,2,31,7,5,1803488935672228918,'generation_failed',CAST('{"generationId":"edit_1795978090981_6ise1mjceu0h19ac","kind":"edit","sequence":5,"status":"failed","message":"Image editing failed!","progress":60,"occurredAt":"2026-11-29T18:48:10.994Z","error":"The image service declined this request.","code":"provider_rejected","failedStage":"openai_editing","retryable":false,"credit":96}' AS BLOB));
INSERT INTO "events" VALUES(43,2,32,8,1,1497486047126340304,'generation_started',NULL);
INSERT INTO "events" VALUES(44,2,33,8,2,5025160601247613848,'continue',NULL);
INSERT INTO "events" VALUES(45,2,34,8,3,3331434310418190151,'continue',NULL);
INSERT INTO "events" VALUES(46,2,35,8,4,6141462553274275247,'continue',NULL);
INSERT INTO "events" VALUES(47,2,36,8,5,1606365171002344708,'generation_completed',NULL);
INSERT INTO "events" VALUES(48,2,37,9,1,7527413148866741052,'generation_started',CAST('{"generationId":"edit_1795978091083_zf7ss979s0eyz0de","kind":"edit","sequence":1,"status":"started","message":"Image editing started...","progress":0,"occurredAt":"2026-11-29T18:48:11.084Z","inputImage":"http://pictures.test/face.png","credit":101}' AS BLOB));
INSERT INTO "events" VALUES(49,2,38,9,2,6495947266705834113,'continue',CAST('{"generationId":"edit_1795978091083_zf7ss979s0eyz0de","kind":"edit","sequence":2,"status":"composition","message":"Composing images...","progress":20,"occurredAt":"2026-11-29T18:48:11.088Z"}' AS BLOB));
INSERT INTO "events" VALUES(50,2,39,9,3,8581166398257829491,'continue',CAST('{"generationId":"edit_1795978091083_zf7ss979s0eyz0de","kind":"edit","sequence":3,"status":"composition_completed","message":"Image composition completed, starting OpenAI editing...","progress":40,"occurredAt":"2026-11-29T18:48:11.096Z","compositionUrl":"http://localhost:3000/images/edit_1795978091083_zf7ss979s0eyz0de-6947bdf39ed31703b75a33823807408e.png"}' AS BLOB));
INSERT INTO "events" VALUES(51,2,40,9,4,9031014463880504432,'continue',CAST('{"generationId":"edit_1795978091083_zf7ss979s0eyz0de","kind":"edit","sequence":4,"status":"openai_editing","message":"OpenAI image editing started...","progress":60,"occurredAt":"2026-11-29T18:48:11.098Z","compositionUrl":"http://localhost:3000/images/edit_1795978091083_zf7ss979s0eyz0de-6947bdf39ed31703b75a33823807408e.png"}' AS BLOB));
INSERT INTO "events" VALUES(52,2,41,9,5,1190882227931886716,'continue',CAST('{"generationId":"edit_1795978091083_zf7ss979s0eyz0de","kind":"edit","sequence":5,"status":"openai_editing","message":"The picture takes shape...","progress":70,"occurredAt":"2026-11-29T18:48:11.099Z","compositionUrl":"http://localhost:3000/images/edit_1795978091083_zf7ss979s0eyz0de-6947bdf39ed31703b75a33823807408e.png"}' AS BLOB));
INSERT INTO "events" VALUES(53,2,42,10,1,7130664953612739916,'generation_started',CAST('{"generationId":"edit_1795978092100_nllze0kj565qhkuv","kind":"edit","sequence":1,"status":"started","message":"Image editing started...","progress":0,"occurredAt":"2026-11-29T18:48:12.103Z","credit":100}' AS BLOB));
INSERT INTO "events" VALUES(54,2,43,11,1,7611077994539760684,'generation_started',CAST('{"generationId":"edit_1795978092125_bumis7s697sew1ur","kind":"edit","sequence":1,"status":"started","message":"Image editing started...","progress":0,"occurredAt":"2026-11-29T18:48:12.129Z","credit":99}' AS BLOB));
INSERT INTO "events" VALUES(55,2,44,11,2,268887949762581710,'generation_failed',CAST('{"generationId":"edit_1795978092125_bumis7s697sew1ur","kind":"edit","sequence":2,"status":"failed","message":"Image editing failed!","progress":0,"occurredAt":"2026-11-29T18:48:12.133Z","error":"The generation was cancelled.","code":"cancelled","failedStage":"started","retryable":true,"credit":100}' AS BLOB));
INSERT INTO "events" VALUES(56,2,45,12,1,5193819476261941049,'generation_started',CAST('{"generationId":"edit_1795978092150_g1i0mxtovztrzyjy","kind":"edit","sequence":1,"status":"started","message":"Image editing started...","progress":0,"occurredAt":"2026-11-29T18:48:12.150Z","credit":99}' AS BLOB));
INSERT INTO "events" VALUES(57,2,46,12,2,4621170472975201371,'continue',CAST('{"generationId":"edit_1795978092150_g1i0mxtovztrzyjy","kind":"edit","sequence":2,"status":"composition","message":"Composing images...","progress":20,"occurredAt":"2026-11-29T18:48:12.160Z"}' AS BLOB));
INSERT INTO "events" VALUES(58,2,47,12,3,6956881475840433748,'continue',CAST('{"generationId":"edit_1795978092150_g1i0mxtovztrzyjy","kind":"edit","sequence":3,"status":"composition_completed","message":"Image composition completed, starting OpenAI editing...","progress":40,"occurredAt":"2026-11-29T18:48:12.183Z","compositionUrl":"https://cdn.example.com/sheet.png"}' AS BLOB));
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
    , free INTEGER NOT NULL DEFAULT 0);
INSERT INTO "generations" VALUES(2,'edit_1795978090576_ew8gxsq2676cnbfr',1,'edit',CAST('{"prompt":"a red hat","options":{"quality":"auto","background":"auto","aspect_ratio":"2:3","input_fidelity":null},"images":["edit_1795978090576_ew8gxsq2676cnbfr-1500832486492b88e56d51ea7e57ccaa.jpg"],"image_urls":[],"face_swap":false,"metadata":null,"external":false}' AS BLOB),NULL,'25e564de9b9dd28305aa2f3e5aeba87c2248c57aab0e41da83d83b321151b671',1,6,11,1795978090677059,11,0,1,0);
INSERT INTO "generations" VALUES(3,'edit_1795978090730_16cg1h2e4l9uj1gt',2,'edit',CAST('{"prompt":"Şapkayı kırmızı yap 🎩","options":{"quality":"auto","background":"auto","aspect_ratio":"2:3","input_fidelity":null},"images":["edit_1795978090730_16cg1h2e4l9uj1gt-58ed3294b0664a47e1845977a4c955de.jpg"],"image_urls":[],"face_swap":false,"metadata":{"title":"Şapka 🎩"},"external":false}' AS BLOB),'first','15533ec15606062da5629a72a5b1a3dc7bbdfb6dda0e0aba6b00910bfe43e4b0',1,1,6,1795978090772226,17,0,1,0);
INSERT INTO "generations" VALUES(4,'edit_1795978090809_zihjz7coxgpltyck',2,'edit',CAST('{"prompt":"a red hat","options":{"quality":"auto","background":"auto","aspect_ratio":"2:3","input_fidelity":null},"images":["edit_1795978090809_zihjz7coxgpltyck-a25013eebe43f2de0896c84309bbdb48.jpg"],"image_urls":["http://pictures.test/face.png"],"face_swap":true,"metadata":null,"external":false}' AS BLOB),NULL,'3d863e3430480dd8b1a481135efd6e65e7da94dc0f87d84c21796872a9f853e2',1,7,14,1795978090885572,25,0,1,0);
INSERT INTO "generations" VALUES(5,'edit_1795978090910_kj7tzzarvurb94d9',2,'edit',CAST('{"prompt":"a red hat","options":{"quality":"auto","background":"auto","aspect_ratio":"2:3","input_fidelity":null},"images":["edit_1795978090910_kj7tzzarvurb94d9-79c301dacc3e01175e89c40d6f8aa14c.jpg"],"image_urls":["http://pictures.test/face.png"],"face_swap":true,"metadata":null,"external":false}' AS BLOB),NULL,'3d863e3430480dd8b1a481135efd6e65e7da94dc0f87d84c21796872a9f853e2',1,15,21,1795978090923806,32,0,1,0);
INSERT INTO "generations" VALUES(6,'gen_1795978090945_w6l4k30rpwft48li',2,'generate',CAST('{"prompt":"a red hat","options":{"quality":"high","background":"transparent","aspect_ratio":"3:2","input_fidelity":"high"},"images":["gen_1795978090945_w6l4k30rpwft48li-3675129bc15604f45f947a2d7648c063.jpg","gen_1795978090945_w6l4k30rpwft48li-804520b577bf2f1ad62a985517eb019d.jpg"],"image_urls":[],"face_swap":false,"metadata":null,"external":false}' AS BLOB),NULL,'00ca2743250e43c214f5f62d4d2e5b855e319b5390ca89f52d330cec5e425f59',1,22,26,1795978090960943,37,0,1,0);
INSERT INTO "generations" VALUES(7,'edit_1795978090981_6ise1mjceu0h19ac',2,'edit',CAST('{"prompt":"fail","options":{"quality":"auto","background":"auto","aspect_ratio":"2:3","input_fidelity":null},"images":["edit_1795978090981_6ise1mjceu0h19ac-47207d6fcd69e51a1c2df66f0a15625f.jpg"],"image_urls":[],"face_swap":false,"metadata":null,"external":false}' AS BLOB),NULL,'c25d1f49ebe9fa304da67fc06c3ee7c89aa2b0274fcb3a3764ee1245c81afd64',1,27,31,1795978090994909,42,0,1,0);
INSERT INTO "generations" VALUES(8,'gen_1795978091016_j10tamx67h0xd3t5',2,'generate',X'',NULL,'',1,32,36,1795978091031489,47,1,0,0);
INSERT INTO "generations" VALUES(9,'edit_1795978091083_zf7ss979s0eyz0de',2,'edit',CAST('{"prompt":"hold","options":{"quality":"auto","background":"auto","aspect_ratio":"2:3","input_fidelity":null},"images":["edit_1795978091083_zf7ss979s0eyz0de-6ada0a12549cc34ec446f4355bcc2b0a.jpg"],"image_urls":["http://pictures.test/face.png"],"face_swap":true,"metadata":null,"external":false}' AS BLOB),NULL,'87ed603be1e0f2261a5bf527ce7ec52e5718ffd96b99229b24f6e9558da7cd95',1,37,NULL,NULL,NULL,0,0,0);
INSERT INTO "generations" VALUES(10,'edit_1795978092100_nllze0kj565qhkuv',2,'edit',CAST('{"prompt":"waits","options":{"quality":"auto","background":"auto","aspect_ratio":"2:3","input_fidelity":null},"images":["edit_1795978092100_nllze0kj565qhkuv-7e2157110c2a03cde40b04806519ab6c.jpg"],"image_urls":[],"face_swap":false,"metadata":null,"external":false}' AS BLOB),'second','28cc32a7e63d35b6d1dad543e97168a443c6fc7c0819c7f8e75e55fbad84ebef',1,42,NULL,NULL,NULL,0,0,0);
INSERT INTO "generations" VALUES(11,'edit_1795978092125_bumis7s697sew1ur',2,'edit',CAST('{"prompt":"cancel me","options":{"quality":"auto","background":"auto","aspect_ratio":"2:3","input_fidelity":null},"images":["edit_1795978092125_bumis7s697sew1ur-0a5a550e7ba45e484a102f47f85deb99.jpg"],"image_urls":[],"face_swap":false,"metadata":null,"external":false}' AS BLOB),NULL,'96c806dbec4c8ad09e3e4ad437a544928638af58e814d400c5808adf4138e59a',1,43,44,1795978092133535,55,0,1,0);
INSERT INTO "generations" VALUES(12,'edit_1795978092150_g1i0mxtovztrzyjy',2,'edit',CAST('{"prompt":"outside","options":{"quality":"auto","background":"auto","aspect_ratio":"2:3","input_fidelity":null},"images":[],"image_urls":[],"face_swap":false,"metadata":null,"external":true}' AS BLOB),NULL,'746c705c635df2b0cfd7f0ba7d3f091da0d5bf07e0a708d714f526a6fe196319',1,45,NULL,NULL,NULL,0,0,0);
CREATE TABLE grants (
        user INTEGER NOT NULL REFERENCES users,
        idempotency_key TEXT NOT NULL,
        amount INTEGER NOT NULL,
        credit INTEGER NOT NULL,
        until INTEGER NOT NULL,             -- microseconds since 1970
        PRIMARY KEY (user, idempotency_key)
    ) WITHOUT ROWID;
INSERT INTO "grants" VALUES(2,'grant-1',7,102,1796064491076342);
CREATE TABLE log (epoch TEXT NOT NULL);
INSERT INTO "log" VALUES('f53eca5ea9f6853d');
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
    , untold TEXT NOT NULL DEFAULT '[]');
INSERT INTO "sessions" VALUES(1,'e3dxab7b4iwqniejxad0upr607038v8b','ada',NULL,0,0,2440621933075161392,0,0,NULL,1795978090707388,'[]');
CREATE TABLE users (
        id INTEGER PRIMARY KEY,
        user_id TEXT NOT NULL UNIQUE,
        credit INTEGER,                     -- NULL: no balance has been kept
        head INTEGER NOT NULL,
        floor INTEGER NOT NULL,
        floor_id INTEGER NOT NULL
    );
INSERT INTO "users" VALUES(1,'bob',98,11,5,7422214427511770613);
INSERT INTO "users" VALUES(2,'ada',99,47,0,2440621933075161392);
CREATE TABLE damaged_generations (
        tombstone INTEGER NOT NULL REFERENCES generations ON DELETE CASCADE, reason TEXT NOT NULL,
        id, generation_id, user, kind, order_json, idempotency_key, fingerprint, reserved, first_position,
        end_position, ended_at, end_event, deleted, undelivered
    );
CREATE TABLE damaged_events (
        tombstone INTEGER NOT NULL REFERENCES generations ON DELETE CASCADE,
        id, user, position, generation, sequence, event_id, name, event
    );
CREATE UNIQUE INDEX generation_of_key ON generations (user, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX listed_generations ON generations (user, first_position) WHERE deleted = 0;
CREATE INDEX active_generations ON generations (user, first_position) WHERE end_position IS NULL;
CREATE INDEX deleted_generations ON generations (user, end_position, first_position) WHERE deleted = 1;
CREATE INDEX ended_generations ON generations (ended_at, end_event) WHERE ended_at IS NOT NULL;
CREATE INDEX undelivered_generations ON generations (end_event) WHERE undelivered = 1;
CREATE UNIQUE INDEX event_at_position ON events (user, position);
CREATE UNIQUE INDEX event_of_sequence ON events (generation, sequence);
CREATE INDEX expiring_grants ON grants (until);
CREATE INDEX sessions_of_user ON sessions (user_id, touched_at);
CREATE INDEX expiring_sessions ON sessions (touched_at);
CREATE INDEX damaged_generations_by_tombstone ON damaged_generations (tombstone);
CREATE INDEX damaged_events_by_tombstone ON damaged_events (tombstone);
COMMIT;
