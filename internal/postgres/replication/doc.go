// Package replication receives WAL from a running server, primary or standby,
// by the replication protocol.
//
//	Connect → Server → Receive → SEGMENT.partial → SEGMENT, HISTORY → next timeline …
//	StartCapture → Until → Segments → Stop
//
// What always holds: a file with the name of a segment is whole and durable;
// the server is never told to forget what the caller has not said is safe; a
// segment is begun anew in place, so what was safe once stays safe.
package replication
