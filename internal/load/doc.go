// Package load is a machine: it puts production-like load on a real
// PostgreSQL server, remembers outside of the database what the server
// promised, and judges any copy of that database against it.
//
//	Create → Start (beaters) → Mark, the cut → Promise → Judge a copy → Finding
//
// What always holds:
//   - All of it lives in the schema "play"; nothing else is written, except
//     that Churn may switch WAL segments and order checkpoints, and that Files
//     fills the folders it is told.
//   - A beater's session has at most one operation under way. So what one
//     stream sent and what was acknowledged to it are the prefixes 1…n of its
//     ids, and a promise is a few numbers whatever the size of the run.
//   - An id counts as sent before its first byte leaves and as acknowledged
//     after the server's answer was read, by the monotonic clock. So "before
//     the cut" never claims too much, and "sent" never too little.
//   - A beater never reconnects. A broken connection ends it and is told by
//     Err; being stopped or cancelled is a clean end.
//
// A promise binds the server only if it runs with fsync=on; the sessions
// themselves set synchronous_commit=on. PostgreSQL 13 to 18.
package load
