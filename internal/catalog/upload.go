package catalog

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"runtime"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"cleancut/internal/backup"
)

// The sizes of an upload. S3 takes at most 10,000 parts, each but the last of
// at least 5 MiB (User Guide, "Amazon S3 multipart upload limits"). Two parts
// of the first smallParts share the memory of one upload, and one is filled
// while the other is sent; each of the rest takes all of it. That is 8 GiB in
// small parts, and 148 GiB at most.
type sizes struct{ part, smallParts, maxParts int }

func s3Sizes() sizes { return sizes{part: 8 << 20, smallParts: 1000, maxParts: 10_000} }

const (
	// The memory for parts is most of this program's heap, and the collector
	// would let the heap grow to twice its size before it begins. It takes
	// a millisecond.
	collectEvery = 8
)

const (
	tokenKey = "cleancut-put" // metadata of an object: which Put made it
	conflict = 5              // attempts while others delete and put the same key
	undoTime = 30 * time.Second
)

// upload is one Put.
type upload struct {
	client  *s3.Client
	bucket  string
	key     string
	token   string
	sizes   sizes
	id      string // of the multipart upload
	done    []types.CompletedPart
	sum     uint32 // CRC32 of all parts so far
	size    int64
	pending chan error // the part that is being sent; nil if none is
}

func newUpload(client *s3.Client, bucket, key string, sizes sizes) *upload {
	return &upload{client: client, bucket: bucket, key: key, token: rand.Text(), sizes: sizes}
}

// put reads as much as fits into one request. Only what is larger takes the
// memory for parts.
func (u *upload) put(ctx context.Context, r io.Reader) error {
	from := reader{ctx, r}
	buf := make([]byte, min(64<<10, u.sizes.part))
	n, last, err := fill(from, buf)
	if err == nil && !last {
		more := make([]byte, 2*u.sizes.part)
		copy(more, buf)
		buf = more
		var m int
		m, last, err = fill(from, buf[n:u.sizes.part])
		n += m
	}
	if err == nil {
		err = ctx.Err() // it may have ended with the last byte
	}
	switch {
	case err != nil:
		return err
	case last:
		return u.whole(ctx, buf[:n])
	}
	return u.inParts(ctx, r, buf)
}

// sourceError is what the caller's reader said. It tells nothing of S3.
type sourceError struct{ error }

func (e sourceError) Unwrap() error { return e.error }

// fill reads until buf is full or r ends. Only io.EOF is an end: to take
// io.ErrUnexpectedEOF for one, as io.ReadFull's result reads, would store half
// of what a broken source has.
func fill(r io.Reader, buf []byte) (n int, last bool, err error) {
	for idle := 0; n < len(buf) && idle < 100; {
		m, err := r.Read(buf[n:])
		n += m
		if err == io.EOF {
			return n, true, nil
		}
		if err != nil {
			return n, false, sourceError{err}
		}
		if idle++; m > 0 {
			idle = 0
		}
	}
	if n < len(buf) {
		return n, false, io.ErrNoProgress
	}
	return n, false, nil
}

// whole puts an object in one request. 409 says that a deletion came in
// between (PutObject, "ConditionalRequestConflict"): then it is sent again.
func (u *upload) whole(ctx context.Context, body []byte) error {
	var err error
	for range conflict {
		_, err = u.client.PutObject(ctx, &s3.PutObjectInput{Bucket: &u.bucket, Key: &u.key, Body: bytes.NewReader(body), ContentLength: aws.Int64(int64(len(body))),
			IfNoneMatch: aws.String("*"), ChecksumCRC32: crc(crc32.ChecksumIEEE(body)), Metadata: map[string]string{tokenKey: u.token}})
		if err == nil {
			return nil
		}
		var settled bool
		if settled, err = u.settle(ctx, err); settled {
			return err
		}
	}
	return err
}

// owner says who made the object under the key.
type owner int

const (
	nobody owner = iota
	us
	others
)

func (u *upload) owner(ctx context.Context) (owner, error) {
	out, err := u.client.HeadObject(ctx, &s3.HeadObjectInput{Bucket: &u.bucket, Key: &u.key})
	switch {
	case status(err) == http.StatusNotFound:
		return nobody, nil
	case err != nil:
		return nobody, err
	case out.Metadata[tokenKey] == u.token:
		return us, nil
	}
	return others, nil
}

// settle finds out what a write that ended with cause has done. The cause
// itself does not say: the SDK may have repeated a request whose answer was
// lost, and then our own object makes the server refuse (412). Settled false:
// nothing is there, and the write may be repeated.
func (u *upload) settle(ctx context.Context, cause error) (settled bool, err error) {
	asking, stop := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer stop()
	who, err := u.owner(asking)
	refused := status(cause) == http.StatusPreconditionFailed || status(cause) == http.StatusConflict
	switch {
	case err != nil && refused:
		return true, errors.Join(cause, fmt.Errorf("whose object is there: %w", err))
	case err != nil:
		return true, cause
	case who == us && ctx.Err() == nil:
		return true, nil
	case who == us: // nobody but us knows of it yet
		_, err := u.client.DeleteObject(asking, &s3.DeleteObjectInput{Bucket: &u.bucket, Key: &u.key})
		return true, errors.Join(ctx.Err(), err)
	case who == others && ctx.Err() == nil:
		return true, fmt.Errorf("%w: %w", backup.ErrExists, cause)
	}
	return !refused || ctx.Err() != nil, cause
}

// inParts puts what begins with first[:u.sizes.part] and goes on with r. first is
// the memory for all parts.
func (u *upload) inParts(ctx context.Context, r io.Reader, first []byte) error {
	if who, err := u.owner(ctx); err != nil || who != nobody { // before sending gigabytes in vain
		if err == nil {
			err = backup.ErrExists
		}
		return err
	}
	out, err := u.client.CreateMultipartUpload(ctx, &s3.CreateMultipartUploadInput{Bucket: &u.bucket, Key: &u.key, Metadata: map[string]string{tokenKey: u.token},
		ChecksumAlgorithm: types.ChecksumAlgorithmCrc32, ChecksumType: types.ChecksumTypeFullObject})
	if err != nil {
		return err
	}
	u.id = aws.ToString(out.UploadId)
	if err = u.send(ctx, r, first); err != nil {
		return errors.Join(err, u.abort(ctx))
	}
	_, err = u.client.CompleteMultipartUpload(ctx, &s3.CompleteMultipartUploadInput{Bucket: &u.bucket, Key: &u.key, UploadId: &u.id, IfNoneMatch: aws.String("*"),
		MultipartUpload: &types.CompletedMultipartUpload{Parts: u.done}, ChecksumCRC32: crc(u.sum), ChecksumType: types.ChecksumTypeFullObject, MpuObjectSize: &u.size})
	if err == nil {
		return nil
	}
	// After the abort nothing can appear any more.
	if aborted := u.abort(ctx); aborted != nil {
		err = errors.Join(err, aborted)
	}
	_, err = u.settle(ctx, err)
	return err
}

// send sends part after part. One is read while the one before it is sent.
func (u *upload) send(ctx context.Context, r io.Reader, memory []byte) (err error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer func() {
		if err != nil {
			stop(err) // the part that is being sent, too
		}
		if sent := u.wait(); err == nil || errors.Is(err, context.Canceled) && sent != nil {
			err = sent // the cause, not its echo in the reader
		}
		stop(err)
	}()
	body, last := memory[:u.sizes.part], false
	for number := 1; ; number++ {
		if number > u.sizes.maxParts {
			return backup.Hint(fmt.Errorf("an object of more than %v: %w", backup.Bytes(u.size), backup.ErrUnsupported), "write a dump as large as this to a file: `cleancut dump --to FILE`")
		}
		if err := u.wait(); err != nil {
			return err
		}
		if number%collectEvery == 0 {
			runtime.GC()
		}
		u.begin(ctx, stop, int32(number), body)
		if last {
			return nil
		}
		next := memory[number%2*u.sizes.part:][:u.sizes.part]
		if number >= u.sizes.smallParts {
			next = memory
			if err := u.wait(); err != nil {
				return err
			}
		}
		n, end, err := fill(reader{ctx, r}, next)
		if err != nil {
			return err
		}
		if n == 0 {
			return nil
		}
		body, last = next[:n], end
	}
}

// begin sends one part in the background. Its failure stops the reading.
func (u *upload) begin(ctx context.Context, stop context.CancelCauseFunc, number int32, body []byte) {
	u.sum = crc32.Update(u.sum, crc32.IEEETable, body)
	u.size += int64(len(body))
	sent := make(chan error, 1)
	u.pending = sent
	go func() {
		out, err := u.client.UploadPart(ctx, &s3.UploadPartInput{Bucket: &u.bucket, Key: &u.key, UploadId: &u.id, PartNumber: &number,
			Body: bytes.NewReader(body), ContentLength: aws.Int64(int64(len(body))), ChecksumCRC32: crc(crc32.ChecksumIEEE(body))})
		if err != nil {
			err = fmt.Errorf("part %d: %w", number, err)
			stop(err)
		} else {
			u.done = append(u.done, types.CompletedPart{ETag: out.ETag, PartNumber: &number, ChecksumCRC32: out.ChecksumCRC32})
		}
		sent <- err
	}()
}

// wait waits until no part is being sent.
func (u *upload) wait() error {
	if u.pending == nil {
		return nil
	}
	err := <-u.pending
	u.pending = nil
	return err
}

// abort ends the multipart upload and frees its parts; ended already: nil.
func (u *upload) abort(ctx context.Context) error {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
	defer stop()
	_, err := u.client.AbortMultipartUpload(ctx, &s3.AbortMultipartUploadInput{Bucket: &u.bucket, Key: &u.key, UploadId: &u.id})
	if err != nil && code(err) != "NoSuchUpload" {
		return fmt.Errorf("abort the upload (`cleancut sweep` does it after a day): %w", err)
	}
	return nil
}

// crc is a CRC32 as S3's headers have it.
func crc(sum uint32) *string {
	return aws.String(base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint32(nil, sum)))
}
