// Package archive brings WAL into the catalog and back.
//
//	Push:   file of archive_command → proved → catalog
//	Fetch:  catalog, or the spool → proved → file for restore_command; Prefetch fills the spool
//	Stream: server → local folder → catalog, for ever
//
// What always holds: what is in the catalog is never replaced; a file gets the
// name that PostgreSQL waits for only when it is whole and proved; "not there"
// is said only where the catalog itself is there.
package archive
